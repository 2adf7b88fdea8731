// Drawings: small SVG charts, and the spectrogram on a canvas. Each has its text alternative beside it.

import { drawn, element } from "./dom";

/** A hue per place, of one lightness to the eye: each has a contrast of at least 3 on dark and on light ground. */
export const colour = (place: number): string => `oklch(0.6 0.14 ${(place * 137.5 + 240) % 360})`;
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 4", "10 4"];

/** A drawing is as wide as the page allows, in its own pixels, so that its text has the size of other text. */
const room = (most: number): number => Math.max(240, Math.min(most, document.documentElement.clientWidth - 56));

export interface Line {
  name: string;
  points: [number, number | null][];
}

/** Lines over time. x and y are in the units of the points; y goes from 0 to `most`. */
export function lines(of: Line[], most: number, label: string, unit: (value: number) => string): HTMLElement {
  const width = room(1120), height = 190, left = 60, bottom = 8;
  const xs = of.flatMap((line) => line.points.map((point) => point[0]));
  const from = Math.min(...xs), to = Math.max(...xs, from + 1e-9);
  const x = (value: number) => left + ((value - from) / (to - from)) * (width - left - 8);
  const y = (value: number) => height - bottom - (Math.min(value, most) / most) * (height - bottom - 12);
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const written = new Set<string>();
  for (const share of [0, 1, 0.5]) {
    const at = y(share * most), words = unit(share * most);
    if (written.has(words)) continue; // half of 1 is rounded, and would be a second 1
    written.add(words);
    svg.append(drawn("line", { x1: left, x2: width - 8, y1: at, y2: at, stroke: "currentColor", "stroke-opacity": 0.25 }));
    svg.append(drawn("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, words));
  }
  of.forEach((line, place) => {
    const kept = line.points.filter((point): point is [number, number] => point[1] !== null);
    const path = kept.map((point, at) => `${at ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
    svg.append(drawn("path", { d: path, fill: "none", stroke: colour(place), "stroke-width": 2, "stroke-dasharray": DASHES[place % DASHES.length] }));
    for (const point of kept) svg.append(drawn("circle", { cx: x(point[0]).toFixed(1), cy: y(point[1]).toFixed(1), r: 3, fill: colour(place) }));
  });
  return element("div", {}, svg as unknown as Node, of.length > 1 && legend(of.map((line) => line.name)));
}

function legend(names: string[]): HTMLElement {
  return element(
    "div",
    { class: "row", "aria-hidden": "true" },
    ...names.map((name, place) => {
      const stroke = { x1: 0, x2: 22, y1: 6, y2: 6, stroke: colour(place), "stroke-width": 3, "stroke-dasharray": DASHES[place % DASHES.length] };
      const sample = drawn("svg", { width: 22, height: 12, viewBox: "0 0 22 12" }, drawn("line", stroke));
      sample.style.width = "22px";
      return element("span", { class: "row" }, sample as unknown as Node, name);
    }),
  );
}

/** Horizontal bars, one per name; values are shares of `most`, and may be negative. */
export function bars(values: [string, number][], most: number, label: string, unit: (value: number) => string): SVGElement {
  const width = room(340), line = 24, names = 84, signed = values.some((pair) => pair[1] < 0), height = values.length * line + 4;
  const space = width - names - 52, zero = signed ? names + space / 2 : names, scale = (signed ? space / 2 : space) / (most || 1);
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  values.forEach(([name, value], place) => {
    const top = place * line + 4, long = Math.min(Math.abs(value), most) * scale;
    svg.append(
      drawn("text", { x: 0, y: top + 13 }, name.length > 11 ? `${name.slice(0, 10)}…` : name),
      drawn("rect", { x: value < 0 ? zero - long : zero, y: top, width: Math.max(long, 1), height: line - 8, fill: colour(place) }),
      drawn("text", { x: width, y: top + 13, "text-anchor": "end" }, unit(value)),
    );
  });
  return svg;
}

/** Many numbers as thin columns around their zero line, such as features. */
export function columns(values: number[], label: string): SVGElement {
  const width = room(900), height = 70, most = Math.max(...values.map(Math.abs), 1e-9);
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const step = width / Math.max(values.length, 1);
  const path = values.map((value, at) => `M${(at * step + step / 2).toFixed(1)} ${height / 2}v${((-value / most) * (height / 2 - 2)).toFixed(1)}`);
  svg.append(drawn("path", { d: path.join(""), stroke: colour(0), "stroke-width": Math.max(step * 0.7, 0.4) }));
  return svg;
}

/** Bytes that travelled as text. */
export const decoded = (text: string): Uint8Array<ArrayBuffer> => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** Levels from 0 to 255, (bins, columns), low frequencies first, as a picture. */
export function spectrogram(canvas: HTMLCanvasElement, values: Uint8Array, bins: number, wide: number): void {
  canvas.width = wide;
  canvas.height = bins;
  const context = canvas.getContext("2d")!;
  const picture = context.createImageData(wide, bins);
  for (let bin = 0; bin < bins; bin++)
    for (let column = 0; column < wide; column++) {
      const value = values[bin * wide + column] ?? 0, at = ((bins - 1 - bin) * wide + column) * 4;
      picture.data.set([Math.min(255, value * 1.2), Math.max(0, value - 60) * 1.3, Math.max(60 - value, 0) + value * 0.3, 255], at);
    }
  context.putImageData(picture, 0, 0);
}

/** A JPEG picture with boxes on it. */
export async function picture(canvas: HTMLCanvasElement, jpeg: string, boxes: number[][]): Promise<void> {
  const bitmap = await createImageBitmap(new Blob([decoded(jpeg)], { type: "image/jpeg" }));
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d")!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  context.lineWidth = 4;
  context.strokeStyle = "#ffd400";
  for (const [left, top, width, height] of boxes) context.strokeRect(left!, top!, width!, height!);
}
