// The shell: which views there are, which is open, and the stream that feeds it.

import "./page.css";
import { facts, watch, type Facts } from "./api";
import { serving } from "./cloud";
import { element, say } from "./dom";
import { link } from "./link";
import { mine } from "./mine";
import { now } from "./now";
import { sent } from "./sent";
import { attempt, tell, type View } from "./view";

const state = document.getElementById("state")!;
const main = document.getElementById("main")!;

async function begin(): Promise<void> {
  const page = await facts();
  document.title = `Isthmus: ${page.name}`;
  say(document.getElementById("title")!, `Isthmus: ${page.name}`);
  if (page.page === "cloud") service(page);
  else device(page);
}

/** The serving side's page: one view, read anew every few seconds. */
function service(page: Facts): void {
  const view = serving();
  main.replaceChildren(view.content);
  document.getElementById("views")!.append(element("a", { href: "#service", "aria-current": "page" }, view.title), page.student ? element("a", { href: "./browser.html" }, "Try it in this browser") : "");
  async function again(): Promise<void> {
    if (!document.hidden)
      try {
        await view.refresh!();
        say(state, `The last minute of the ${page.name}.`);
        state.className = "";
      } catch (error) {
        say(state, error instanceof Error ? error.message : String(error));
        state.className = "warn";
      }
    window.setTimeout(again, view.every! * 1000);
  }
  void again();
}

function device(page: Facts): void {
  const views: Record<string, View> = { now: now(), mine: mine(), sent: sent(), link: link() };
  const nav = document.getElementById("views")!;
  const links = Object.entries(views).map(([name, view]) => element("a", { href: `#${name}` }, view.title));
  nav.append(...links, element("a", { href: "./browser.html" }, "In this browser"));
  let open: View | undefined;
  let running: boolean | undefined;
  let stop: (() => void) | undefined;
  let timer = 0;

  const wanted = (): string => {
    const name = location.hash.slice(1);
    return name in views ? name : "now";
  };

  function warn(text: string): void {
    say(state, text);
    state.className = "warn";
  }

  function heard(kind: string, facts: any): void {
    if (kind === "device") {
      if (facts.running && running === false) void refresh();
      running = facts.running;
      if (facts.running) {
        say(state, "This device runs.");
        state.className = "";
      } else
        warn(facts.problem || `No device runs in ${page.folder}. Start it with: isthmus edge run --cloud HOST:PORT --state ${page.folder}. This page connects by itself.`);
    } else if (kind === "event" && facts.kind === "trouble") say(state, facts.text);
    else if (kind === "event" && facts.kind === "answered") say(state, "This device runs.");
    // Every view hears the events, so that one that is opened later knows them.
    for (const view of Object.values(views)) if (kind !== "look" || view === open) view.heard?.(kind, facts);
  }

  async function refresh(): Promise<void> {
    const view = open;
    if (view?.refresh) await attempt(async () => view.refresh!());
  }

  /** Connect to the stream, with pictures only if they are shown. */
  function connect(): void {
    stop?.();
    stop = document.hidden ? undefined : watch(Boolean(open?.looks), heard, () => warn("The page's server does not answer; trying again."));
    if (document.hidden) running = undefined;
  }

  function again(): void {
    window.clearTimeout(timer);
    if (open?.every && !document.hidden)
      timer = window.setTimeout(async () => {
        const focused = main.contains(document.activeElement) && document.activeElement !== main;
        const reading = main.querySelector("details[open]");
        if (!focused && !reading && open?.refresh) await open.refresh().catch(() => undefined);
        again();
      }, open.every * 1000);
  }

  function show(moved: boolean): void {
    const name = wanted();
    open = views[name]!;
    for (const each of links) each.toggleAttribute("aria-current", false);
    links[Object.keys(views).indexOf(name)]!.setAttribute("aria-current", "page");
    main.replaceChildren(open.content);
    tell("");
    connect();
    void refresh();
    again();
    if (!moved) return;
    // A view begins at its top: the browser would scroll to the content, and the state above it would be out of sight.
    main.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }

  window.addEventListener("hashchange", () => show(true));
  document.addEventListener("visibilitychange", () => {
    connect();
    again();
  });
  show(false);
}

begin().catch((error: Error) => {
  say(state, error.message);
  state.className = "warn";
});
