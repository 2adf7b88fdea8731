// Now: what the device sees and hears, and how it answers.

import type { Facts } from "./api";
import { bars, decoded, lines, picture, spectrogram, type Line } from "./draw";
import { element, put, say, section } from "./dom";
import { bytes, clock, count, percent, seconds, which } from "./words";
import type { View } from "./view";

const SHOWN = 30;

export function now(): View {
  const camera = element("canvas", { class: "picture", role: "img", "aria-label": "the camera's picture", width: 320, height: 240 });
  const cameraSaid = element("p", { class: "quiet" }, "Waiting for the camera.");
  const sound = element("canvas", { class: "sound", role: "img", "aria-label": "spectrogram of the last seconds", width: 150, height: 64 });
  const soundSaid = element("p", { class: "quiet" }, "Waiting for the microphone.");
  const label = element("p", { class: "big" }, "–");
  const how = element("p", {}, "No clip has been answered yet.");
  const shares = element("div");
  const trend = element("div");
  const trendSaid = element("p", { class: "quiet" });
  const recent = element("ul", { class: "list" });
  let events: Facts[] = [];
  let drawing = false;

  function newest(kind: string): Facts | undefined {
    return events.findLast((event) => event.kind === kind);
  }

  function showAnswer(): void {
    const last = newest("answered");
    if (!last) return;
    const classes: string[] = last.classes;
    const shown: number[] = last.probabilities ?? [];
    say(label, last.label ?? "no answer");
    say(how, answerWords(last));
    const pairs = classes.map((name, place): [string, number] => [name, shown[place] ?? 0]);
    put(shares, bars(pairs, 1, `probabilities: ${pairs.map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`, percent));
    const answered = events.filter((event) => event.kind === "answered" && event.probabilities).slice(-SHOWN);
    if (answered.length > 1) {
      const over: Line[] = classes.map((name, place) => ({ name, points: answered.map((event) => [event.at_s, event.probabilities[place] ?? null]) }));
      const labels = answered.map((event) => event.label);
      const words = `The last ${count(answered.length, "answer")}, oldest first: ${labels.join(", ")}.`;
      put(trend, lines(over, 1, words, percent));
      say(trendSaid, words);
    }
  }

  function showRecent(): void {
    // What happens again and again, such as an empty room, is one line with the time since when.
    const shown: { event: Facts; since: Facts; times: number }[] = [];
    for (const event of events.filter((event) => event.kind !== "progress")) {
      const last = shown.at(-1);
      if (last && event.kind !== "answered" && last.event.kind === event.kind && eventWords(last.event) === eventWords(event))
        Object.assign(last, { event, times: last.times + 1 });
      else shown.push({ event, since: event, times: 1 });
    }
    const words = ({ event, since, times }: (typeof shown)[number]): string =>
      `${clock(event.at_s)} · ${eventWords(event)}${times > 1 ? ` (${times} times since ${clock(since.at_s)})` : ""}`;
    put(recent, ...shown.slice(-12).reverse().map((each) => element("li", {}, words(each))));
  }

  return {
    title: "Now",
    looks: true,
    content: element(
      "div",
      { class: "cards" },
      section("Answer", "", label, how, shares),
      section("Camera", "", camera, cameraSaid),
      section("Sound", "", sound, soundSaid),
      section("Answers over time", "wide", trend, trendSaid),
      section("What happened", "wide", recent),
    ),
    heard(kind, facts) {
      if (kind === "hello") events = facts;
      else if (kind === "event") events = [...events, facts].slice(-300);
      else if (kind === "look") {
        look(facts);
        return;
      } else return;
      showAnswer();
      showRecent();
    },
  };

  function look(facts: Facts): void {
    if (!facts.view) {
      say(cameraSaid, facts.paused ? "Capture is paused: the camera is closed." : "The camera is closed.");
      say(soundSaid, facts.paused ? "Capture is paused: the microphone is closed." : "The microphone is closed.");
      clear(camera);
      clear(sound);
      return;
    }
    const { picture: seen, sound: heard } = facts.view;
    if (seen && !drawing) {
      drawing = true;
      picture(camera, seen.jpeg, seen.faces).finally(() => (drawing = false));
      const faces = seen.faces.length;
      say(cameraSaid, faces === 0 ? "No face is in the picture." : faces === 1 ? "One face is in the picture; the box is around it." : `${faces} faces are in the picture; the largest one counts.`);
    } else if (!seen) say(cameraSaid, heard ? "The camera gives no picture. Sound alone is answered." : "The camera gives no picture.");
    if (heard) {
      spectrogram(sound, decoded(heard.levels), heard.bins, heard.columns);
      const loud = heard.loudness > 0.03 ? "It is loud." : heard.loudness > 0.003 ? "There is some sound." : "It is silent.";
      say(soundSaid, `The last ${seconds(heard.seconds)} of sound: low tones below, high ones above. ${loud}`);
    } else say(soundSaid, seen ? "The microphone gives no sound. The picture alone is answered." : "The microphone gives no sound.");
  }
}

function clear(canvas: HTMLCanvasElement): void {
  canvas.getContext("2d")!.clearRect(0, 0, canvas.width, canvas.height);
}

function answerWords(event: Facts): string {
  const held = `from ${which(event.sound, event.picture)}`;
  if (event.by === "cloud")
    return (
      `Answered by the cloud ${held}: ratio ${event.ratio}, ${event.number_type}, ${bytes(event.up_bytes)} sent, ` +
      `${seconds(event.took_ms / 1000)} in all, of which ${seconds(event.round_trip_ms / 1000)} on the way and in the cloud.`
    );
  const late = event.asked ? " The cloud was asked too, and its answer was not here in time." : " Nothing of this clip was sent.";
  return `Answered by this device alone ${held}, in ${seconds(event.took_ms / 1000)}.${late}`;
}

function eventWords(event: Facts): string {
  if (event.kind === "answered") return `${event.label ?? "no answer"}. ${answerWords(event)}`;
  if (event.kind === "withheld") return `Withheld: ${event.reason}. Nothing was answered, kept or sent.`;
  return String(event.text ?? event.kind);
}
