// Link: how the way to the cloud is, and what the device makes of it.

import { ask, type Facts } from "./api";
import { lines } from "./draw";
import { element, put, say, section, table } from "./dom";
import type { View } from "./view";
import { bytes, clock, count, percent, seconds } from "./words";

export function link(): View {
  const state = element("p", { class: "big" }, "–");
  const said = element("p");
  const trips = element("div");
  const tripsSaid = element("p", { class: "quiet" });
  const totals = element("div");
  const choices = element("div");
  let events: Facts[] = [];

  async function refresh(): Promise<void> {
    const [facts, status] = await Promise.all([ask("link"), ask("status")]);
    const known: Facts | null = facts.link;
    if (!known) {
      say(state, "unknown");
      say(said, "No device runs here, or it has not begun to answer clips.");
      return;
    }
    const waits = status.waits_s === null ? "" : ` It waits ${seconds(status.waits_s)}: ${status.waits_for}.`;
    const silent = known.overdue_s > 1;
    say(state, known.failures ? "not reached" : silent ? `silent for ${seconds(known.overdue_s)}` : known.samples.length ? "answers" : known.asked ? "not tried yet" : "not asked");
    const setting = known.setting ? ` It would send at ratio ${known.setting.ratio} in ${known.setting.number_type}.` : "";
    if (!known.asks) say(said, "This device was told not to ask the cloud (--no-ask-cloud).");
    else if (known.worth !== null && known.worth <= 0) say(said, `The cloud is not asked: on public clips its answers were no better than this device's own.${waits}`);
    else if (!known.asked && !known.chance) say(said, `No clip was asked of the cloud yet: it answers clips of a finished student alone.${waits}`);
    else say(said, `The next clip's answer comes in time with a chance of ${percent(known.chance)}, as the device estimates it.${setting}${waits}`);
    const samples: Facts[] = known.samples;
    if (samples.length) {
      const kept = samples.filter((each) => each.took_s !== null);
      const most = Math.max(...kept.map((each) => each.took_s), 0.05) * 1.1;
      const times = kept.map((each) => each.took_s).sort((a, b) => a - b);
      const words = `${count(samples.length, "question")}: ${kept.length} answered${times.length ? `, half of them within ${seconds(times[times.length >> 1]!)}` : ""}, ${samples.length - kept.length} lost.`;
      put(trips, lines([{ name: "round trip", points: samples.map((each) => [-each.ago_s, each.took_s]) }], most, words, seconds));
      say(tripsSaid, words);
    } else say(tripsSaid, "No question was answered yet.");
    put(totals, 
      table(["since the device started", "clips"], [
        ["asked the cloud", String(known.asked)],
        ["answered in time", String(known.in_time)],
        ["answered too late", String(known.late)],
        ["never answered", String(known.lost)],
        ["on their way now", String(known.in_flight)],
      ], [1]),
    );
  }

  function showChoices(): void {
    const answered = events.filter((event) => event.kind === "answered").slice(-20).reverse();
    put(choices, 
      answered.length
        ? table(["when", "answered by", "chance", "sent", "took"], answered.map((event) => [
            clock(event.at_s),
            event.by === "cloud" ? `cloud, ratio ${event.ratio}, ${event.number_type}` : event.asked ? "device (cloud was late)" : "device",
            event.chance === null || (!event.chance && !event.asked) ? "–" : percent(event.chance),
            event.up_bytes ? bytes(event.up_bytes) : event.asked ? "asked" : "nothing",
            seconds(event.took_ms / 1000),
          ]), [2, 3, 4])
        : element("p", { class: "quiet" }, "No clip has been answered yet."),
    );
  }

  return {
    title: "Link",
    content: element(
      "div",
      { class: "cards" },
      section("The cloud", "two", state, said),
      section("Counts", "", totals),
      section("Round trips", "wide", trips, tripsSaid),
      section("Choices", "wide", choices),
    ),
    refresh,
    every: 2,
    heard(kind, facts) {
      if (kind === "hello") events = facts;
      else if (kind === "event") events = [...events, facts].slice(-300);
      else return;
      showChoices();
    },
  };
}
