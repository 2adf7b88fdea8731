// The serving side: queue, gammas, outcomes, load and jobs, of the last minute.

import { numbers, type Facts } from "./api";
import { bars, lines } from "./draw";
import { element, put, say, section, table } from "./dom";
import type { View } from "./view";
import { count, percent, seconds } from "./words";

const KEPT_S = 60;

interface Moment {
  at: number;
  of: Facts;
}

/** The sum of a metric's samples, or of those whose label has the value. */
function total(of: Facts, name: string, label?: string, value?: string): number {
  const samples: Facts[] = of[name] ?? [];
  return samples.filter((each) => !label || each.labels[label] === value).reduce((sum, each) => sum + each.value, 0);
}

function values(of: Facts, name: string, label: string): string[] {
  return [...new Set<string>((of[name] ?? []).map((each: Facts) => each.labels[label]))];
}

export function serving(): View {
  let moments: Moment[] = [];
  const load = element("p", { class: "big" }, "–");
  const loadSaid = element("p");
  const loadDrawn = element("div");
  const queue = element("div");
  const queueSaid = element("p", { class: "quiet" });
  const gammas = element("div");
  const outcomes = element("div");
  const utility = element("div");
  const jobs = element("div");
  const frames = element("div");

  function grown(name: string, label?: string, value?: string): number {
    const first = moments[0]!, last = moments.at(-1)!;
    return Math.max(0, total(last.of, name, label, value) - total(first.of, name, label, value));
  }

  function showElastic(now: Facts): void {
    if (!("isthmus_elastic_queue_length" in now)) {
      say(load, "not served");
      say(loadSaid, "This service has no elastic model.");
      for (const each of [queue, gammas, outcomes, utility]) put(each, element("p", { class: "quiet" }, "–"));
      return;
    }
    const spanned = Math.max(moments.at(-1)!.at - moments[0]!.at, 1e-9);
    const busy = total(now, "isthmus_elastic_executors_busy"), executors = total(now, "isthmus_elastic_executors");
    if (moments.length > 1) say(load, `${(grown("isthmus_elastic_arrivals_total") / spanned).toFixed(1)} images per second`);
    say(loadSaid, `${busy} of ${count(executors, "executor")} busy. A batch takes ${total(now, "isthmus_elastic_pace").toFixed(2)} times as long as the profile says.`);
    if (moments.length > 2) {
      const rates = moments.slice(1).map((moment, place): [number, number] => {
        const before = moments[place]!;
        return [moment.at, Math.max(0, total(moment.of, "isthmus_elastic_arrivals_total") - total(before.of, "isthmus_elastic_arrivals_total")) / (moment.at - before.at)];
      });
      const most = Math.max(...rates.map((pair) => pair[1]), 1);
      put(loadDrawn, lines([{ name: "arrivals", points: rates }], most * 1.1, `arrivals per second over ${seconds(spanned)}, at most ${most.toFixed(1)}`, (value) => value.toFixed(0)));
      const waits = moments.map((moment): [number, number] => [moment.at, total(moment.of, "isthmus_elastic_queue_length")]);
      const longest = Math.max(...waits.map((pair) => pair[1]), 1);
      put(queue, lines([{ name: "waiting", points: waits }], Math.max(longest * 1.1, 4), `images waiting over ${seconds(spanned)}, at most ${longest}`, (value) => value.toFixed(0)));
    }
    say(queueSaid, `${count(total(now, "isthmus_elastic_queue_length"), "image")} waiting now.`);
    const of = values(now, "isthmus_elastic_gamma_images_total", "gamma").sort((a, b) => Number(a) - Number(b));
    const images = of.map((gamma): [string, number] => [`gamma ${gamma}`, grown("isthmus_elastic_gamma_images_total", "gamma", gamma)]);
    const batches = grown("isthmus_elastic_batch_images_count"), all = grown("isthmus_elastic_batch_images_sum");
    put(
      gammas,
      bars(images, Math.max(...images.map((pair) => pair[1]), 1), `images by gamma: ${images.map(([name, number]) => `${name} ${number}`).join(", ")}`, (value) => value.toFixed(0)),
      element("p", { class: "quiet" }, batches ? `${count(batches, "batch", "batches")} of ${(all / batches).toFixed(1)} images on average. A negative gamma removes tokens, a positive one adds prompts.` : "No batch ran in this time."),
    );
    const earned = grown("isthmus_elastic_utility_earned_total"), offered = grown("isthmus_elastic_utility_offered_total");
    put(
      utility,
      ...(offered > 0
        ? [
            bars([["earned", earned], ["bound", offered]], Math.max(offered, 1e-9), `utility earned ${earned.toFixed(1)}, bound ${offered.toFixed(1)}`, (value) => value.toFixed(1)),
            element("p", {}, `${percent(earned / offered)} of the bound.`),
            element("p", { class: "quiet" }, "Earned: the utility of each image answered in time, times the task's accuracy at its gamma. The bound: the same if every image had been in time at its best gamma. It knows no limit of the machine, so under overload no policy can reach it."),
          ]
        : [element("p", { class: "quiet" }, "No image has ended in this time.")]),
    );
    const kinds = ["in_time", "late", "dropped", "failed"];
    const tasks = values(now, "isthmus_elastic_arrivals_total", "task");
    put(
      outcomes,
      tasks.length
        ? table(["task", "in time", "late", "dropped", "failed"], tasks.map((task) => {
            const last = moments.at(-1)!, first = moments[0]!;
            const of = (moment: Moment, kind: string) =>
              (moment.of.isthmus_elastic_queries_total ?? []).find((each: Facts) => each.labels.task === task && each.labels.outcome === kind)?.value ?? 0;
            const found = kinds.map((kind) => Math.max(0, of(last, kind) - of(first, kind)));
            const sum = found.reduce((a, b) => a + b, 0);
            return [task, sum ? `${found[0]} (${percent(found[0]! / sum)})` : "0", ...found.slice(1).map(String)];
          }), [1, 2, 3, 4])
        : element("p", { class: "quiet" }, "No task has been asked yet."),
    );
  }

  function showDevices(now: Facts): void {
    const stages = values(now, "isthmus_jobs", "stage").filter((stage) => total(now, "isthmus_jobs", "stage", stage) > 0);
    put(
      jobs,
      element("p", {}, `${count(total(now, "isthmus_devices"), "device")} known.`),
      stages.length
        ? table(["stage", "jobs", "oldest since"], stages.map((stage) => [stage.replaceAll("_", " "), String(total(now, "isthmus_jobs", "stage", stage)), seconds(total(now, "isthmus_jobs_oldest_seconds", "stage", stage))]), [1, 2])
        : element("p", { class: "quiet" }, "No personalisation is known."),
    );
    const methods = values(now, "grpc_server_started_total", "grpc_method");
    const asked = methods.map((method) => [method, grown("grpc_server_started_total", "grpc_method", method)] as [string, number]).filter((pair) => pair[1]);
    put(frames, asked.length ? table(["call", "began"], asked.map(([name, number]) => [name, String(number)]), [1]) : element("p", { class: "quiet" }, "No call began in this time."));
  }

  return {
    title: "Service",
    content: element(
      "div",
      { class: "cards" },
      section("Load", "wide", load, loadSaid, loadDrawn),
      section("Queue", "wide", queue, queueSaid),
      section("Gamma", "", gammas),
      section("Utility", "", utility),
      section("Personalisations", "", jobs),
      section("Calls", "", frames),
      section("What became of the images", "wide", outcomes),
    ),
    every: 2,
    async refresh() {
      const at = performance.now() / 1000;
      moments = [...moments.filter((moment) => at - moment.at <= KEPT_S), { at, of: await numbers() }];
      const now = moments.at(-1)!.of;
      showElastic(now);
      showDevices(now);
    },
  };
}
