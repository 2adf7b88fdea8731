// Elements made by code. Text is always set as text, never as markup.

export type Child = Node | string | null | undefined | false;
type Attributes = Record<string, string | number | boolean | ((event: Event) => void) | undefined>;

function fill(made: Element, attributes: Attributes, children: Child[]): void {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child) made.append(child);
}

export function element<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[Name] {
  const made = document.createElement(name);
  fill(made, attributes, children);
  return made;
}

export function drawn(name: string, attributes: Attributes = {}, ...children: Child[]): SVGElement {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  fill(made, attributes, children);
  return made;
}

/** Replace what is in an element; children that are not there are left out. */
export function put(where: Element, ...children: Child[]): void {
  where.replaceChildren();
  fill(where, {}, children);
}

/** A card: a column wide, or as wide as the page, or two columns wide or two rows tall where there are three columns. */
export type Card = "" | "wide" | "two" | "tall";

export function section(title: string, card: Card, ...children: Child[]): HTMLElement {
  const heading = element("h2", {}, title);
  return element("section", { class: card || undefined, "aria-label": title }, heading, ...children);
}

export function table(heads: string[], rows: (string | Node)[][], numbers: number[] = []): HTMLElement {
  const kind = (place: number) => (numbers.includes(place) ? "number" : undefined);
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...heads.map((head, at) => element("th", { scope: "col", class: kind(at) }, head)))),
    element(
      "tbody",
      {},
      ...rows.map((row) => element("tr", {}, ...row.map((cell, at) => element("td", { class: kind(at) }, cell)))),
    ),
  );
}

/** Set text only if it differs, so that a screen reader does not repeat what it has said. */
export function say(where: Element, text: string): void {
  if (where.textContent !== text) where.textContent = text;
}
