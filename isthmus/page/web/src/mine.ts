// Mine: what the device has learned of its user, the clips it keeps, and what the person can do about both.

import { ask, type Facts } from "./api";
import { bars } from "./draw";
import { element, put, section, table } from "./dom";
import { attempt, tell, type View } from "./view";
import { bytes, count, day, percent, seconds, signed, stage, which } from "./words";

export function mine(): View {
  const progress = element("div");
  const personalise = element("div");
  const compared = element("div");
  const learned = element("div");
  const corrections = element("div");
  const clips = element("div");
  let classes: string[] = [];
  let answers = new Map<string, string>();
  let asked = "";
  let newest: Facts | undefined;

  function showProgress(event: Facts): void {
    newest = event;
    const job = event.job;
    const done: number | undefined = job ? job.progress : event.total ? event.done / event.total : undefined;
    const words = [stage(event.stage)];
    if (job) words.push(`${job.stage.replaceAll("_", " ")}, round ${job.round + 1} of ${job.rounds}`);
    if (job && job.left_s > 0) words.push(`about ${seconds(job.left_s)} left`);
    if (event.total) words.push(event.unit === "bytes" ? `${bytes(event.done)} of ${bytes(event.total)}` : `${event.done} of ${event.total} ${event.unit}`);
    if (event.waits_s !== undefined) words.push(`waits ${seconds(event.waits_s)}: ${event.reason || "the cloud ended the stream"}`);
    put(progress, 
      element("progress", { max: 1, value: done, "aria-label": "progress of the personalisation" }),
      element("p", {}, `${words.join("; ")}.`),
    );
  }

  async function refresh(): Promise<void> {
    const focused = nameOf(document.activeElement);
    await show();
    // What had the focus was drawn anew: a person at a keyboard goes on from there.
    if (focused && document.activeElement === document.body)
      [...document.querySelectorAll<HTMLElement>("main button, main select, main summary")].find((each) => nameOf(each) === focused)?.focus();
  }

  async function show(): Promise<void> {
    const [facts, kept] = await Promise.all([ask("mine"), ask("clips")]);
    const user: Facts | null = facts.user;
    classes = user?.classes ?? [];
    answers = new Map((user?.answers ?? []).map((each: Facts) => [each.clip, each.label]));
    showPersonalise(facts);
    if (!facts.busy) put(progress);
    else if (newest) showProgress(newest);
    showCompared(facts);
    showLearned(user);
    showCorrections(user);
    showClips(kept);
  }

  function showPersonalise(facts: Facts): void {
    const own = facts.student && facts.student !== facts.base_student;
    const budget = facts.epsilon_budget === null ? "" : ` Of a privacy budget of epsilon ${facts.epsilon_budget}, ${facts.epsilon_spent.toFixed(2)} are spent.`;
    put(personalise, 
      element("p", {}, !facts.student ? "No student is here yet." : own ? "A student of your own answers." : "The base student answers, as for everyone."),
      element("p", { class: "quiet" }, `${count(facts.uploads, "upload")} of prototypes so far.${budget}`),
      facts.failure && element("p", {}, `The last try failed: ${facts.failure}. It is tried again.`),
      element(
        "div",
        { class: "row" },
        button("Personalise now", async () => {
          await ask("personalise");
          return "It begins with the next clip. You can follow it here.";
        }, { main: true, disabled: Boolean(facts.wait) }),
        button("Roll back", async () => {
          const now = await ask("rollback");
          return `Student ${now.student} (${now.kind}) answers now. Roll back again to return.`;
        }),
      ),
      facts.wait && element("p", { class: "quiet" }, `A personalisation cannot begin now: ${facts.wait}.`),
    );
  }

  function showCompared(facts: Facts): void {
    const guard: Facts | null = facts.guard;
    const labelled: Facts | null = facts.user?.labelled ?? null;
    const parts: (HTMLElement | SVGElement)[] = [];
    if (guard) {
      parts.push(
        element("p", {}, `The guard ${guard.accepted ? "took" : "refused"} the new student: ${guard.reason}.`),
        element("p", { class: "quiet" }, `It compared both students on ${count(guard.clips, "clip")} of yours; ${guard.changed} of them are answered differently.`),
      );
      if (guard.before !== null && guard.after !== null)
        parts.push(
          element("p", {}, `Estimated, without labels (${guard.by}): ${percent(guard.before)} before, ${percent(guard.after)} after.`),
          bars([["before", guard.before], ["after", guard.after]], 1, `before ${percent(guard.before)}, after ${percent(guard.after)}`, percent),
        );
    }
    if (labelled && labelled.clips)
      parts.push(
        element(
          "p",
          {},
          `Of ${count(labelled.clips, "clip")} that you corrected, ${labelled.before} were right before ` +
            `(${labelled.base ? "the base student" : "this student, not read for you"}) and ${labelled.after} are right ` +
            "now, before it learned your corrections. You correct what is wrong, so both are lower than for all clips.",
        ),
      );
    if (!parts.length) parts.push(element("p", { class: "quiet" }, "Nothing was compared yet."));
    put(compared, ...parts);
  }

  function showLearned(user: Facts | null): void {
    if (!user || !user.sentences.length) {
      put(learned, element("p", { class: "quiet" }, "Nothing was learned of you yet, or the student has no model of people."));
      return;
    }
    const often = classes.map((name, place): [string, number] => [name, user.often[place] ?? 0]);
    put(learned, 
      ...user.sentences.map((sentence: string) => element("p", {}, sentence)),
      element("h3", {}, "How often each class occurs for you"),
      bars(often, 1, `how often: ${often.map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`, percent),
      ...Object.entries(user.offset as Record<string, number[]>).flatMap(([what, row]) => {
        const pairs = classes.map((name, place): [string, number] => [name, row[place] ?? 0]);
        const most = Math.max(...row.map(Math.abs), 0.5);
        const words = `shift by ${what}: ${pairs.map(([name, value]) => `${name} ${signed(value)}`).join(", ")}`;
        return [element("h3", {}, `What your ${what === "sound" ? "voice" : "face"} shifts in every clip (logits)`), bars(pairs, most, words, signed)];
      }),
    );
  }

  function showCorrections(user: Facts | null): void {
    if (!user) {
      put(corrections, element("p", { class: "quiet" }, "There is no student yet that could learn."));
      return;
    }
    const made: Facts[] = user.corrections;
    put(corrections, 
      element("div", { class: "row" },
        button("Ask me about a clip", async () => {
          const question = await ask("question");
          asked = question.clip;
          const guesses = Object.entries(question.guesses as Record<string, number>).map(([name, share]) => `${name} ${percent(share)}`);
          await refresh();
          document.getElementById("asked")?.focus();
          return `What was ${question.clip}? This device thinks: ${guesses.join(", ")}. Choose below.`;
        }),
        made.length > 0 && button("Take back the newest", async () => {
          const gone = await ask("undo_correction");
          await refresh();
          return `Taken back: ${gone.clip} was ${gone.label}. ${changes(gone.changed)}`;
        }),
      ),
      asked && correcting(asked, "asked"),
      made.length
        ? table(["clip", "you said", "without your corrections", "now"], made.map((each) => [each.clip, each.label, each.without ?? "–", each.now ?? "–"]))
        : element("p", { class: "quiet" }, "You have corrected nothing yet. Say below what a clip was."),
      made.length > 0 && element("p", {}, `Your corrections change the answer to ${user.changed.length} of the ${count(user.remembered, "clip")} that this device remembers.`),
    );
  }

  function correcting(clip: string, id?: string): HTMLElement {
    const choice = element("select", { id, "aria-label": `what ${clip} was` }, element("option", { value: "" }, "it was …"), ...classes.map((name) => element("option", { value: name }, name)));
    return element("div", { class: "row" }, element("span", {}, clip), choice, button("Say", async () => {
      if (!choice.value) return "Choose first what it was.";
      const made = await ask("correct", { clip, label: choice.value });
      asked = "";
      await refresh();
      return `Learned: ${made.clip} was ${made.label}. ${changes(made.changed)}`;
    }, { label: `say what ${clip} was` }));
  }

  function showClips(kept: Facts): void {
    const found: Facts[] = kept.clips;
    const total = found.reduce((sum, clip) => sum + clip.bytes, 0);
    put(clips, 
      element("p", {}, `${count(found.length, "clip")}, ${bytes(total)}. None was ever sent. At most ${kept.limits.clips} clips are kept, for ${Math.round(kept.limits.age_s / 86400)} days.`),
      element("p", {}, kept.paused ? "Capture is paused: camera and microphone are closed." : "Capture is on."),
      element("div", { class: "row" },
        button(kept.paused ? "Go on capturing" : "Pause capture", async () => {
          const now = await ask("pause_capture", { paused: !kept.paused });
          await refresh();
          return now.paused ? "Paused. A running device closes camera and microphone within one clip." : "Capture goes on.";
        }),
        found.length > 0 && button("Delete all clips", async () => {
          if (!window.confirm(`Delete all ${count(found.length, "clip")}, and what was learned of them?`)) return "Nothing was deleted.";
          const gone = await ask("delete_clips", { names: [], everything: true });
          await refresh();
          return `Deleted ${count(gone.deleted, "clip")}, and what was learned of them on this device.`;
        }),
      ),
      element("ul", { class: "list" }, ...found.slice(0, 30).map(clipItem)),
      found.length > 30 && element("p", { class: "quiet" }, `and ${found.length - 30} older ones`),
    );
  }

  function clipItem(clip: Facts): HTMLElement {
    const name: string = clip.name;
    const shown = element("div");
    const details = element("details", {}, element("summary", {}, `${day(clip.captured_s)}: ${which(clip.sound, clip.picture)}${answers.has(name) ? `, answered ${answers.get(name)}` : ""}${clip.kept ? ", kept" : ""}`), shown);
    details.addEventListener("toggle", () => {
      if (!details.open || shown.childElementCount) return;
      shown.append(...[
        clip.picture && element("img", { src: `./api/clips/${name}/pictures.jpg`, alt: `pictures of the clip ${name}, in order of time` }),
        clip.sound && element("audio", { controls: true, preload: "none", src: `./api/clips/${name}/sound.wav`, "aria-label": `sound of the clip ${name}` }),
        answers.has(name) ? correcting(name) : element("p", { class: "quiet" }, "This clip is not remembered for corrections."),
        element("div", { class: "row" },
          button("Delete", async () => {
            await ask("delete_clips", { names: [name], everything: false });
            await refresh();
            return `${name} is deleted.`;
          }, { label: `delete ${name}` }),
          !clip.kept && button("Keep", async () => {
            await ask("keep_clips", { names: [name] });
            await refresh();
            return `${name} is kept beyond its time.`;
          }, { label: `keep ${name} beyond its time` }),
        ),
      ].filter(Boolean) as Node[]);
    });
    return element("li", {}, details);
  }

  return {
    title: "Mine",
    content: element(
      "div",
      { class: "cards" },
      section("Personalise", "", personalise, progress),
      section("Before and after", "", compared),
      section("What it learned of you", "tall", learned),
      section("Corrections", "two", corrections),
      section("Your clips", "wide", clips),
    ),
    refresh,
    heard(kind, facts) {
      if (kind === "hello") {
        newest = (facts as Facts[]).findLast((event) => event.kind === "progress");
      } else if (kind === "event" && facts.kind === "progress") {
        showProgress(facts);
        if (/^(swap|judge|verify)/.test(facts.stage)) window.setTimeout(() => refresh().catch(() => tell("")), 1500);
      }
    },
  };
}

const nameOf = (each: Element | null): string =>
  each && each !== document.body && each.id !== "main" ? (each.getAttribute("aria-label") ?? each.textContent ?? "") : "";

function changes(changed: Facts[]): string {
  if (!changed.length) return "It changed the answer to no clip that is remembered.";
  const shown = changed.slice(0, 3).map((each) => `${each.clip}: ${each.before} → ${each.after}`);
  return `It changed the answer to ${count(changed.length, "clip")}: ${shown.join("; ")}${changed.length > 3 ? " …" : ""}.`;
}

function button(text: string, work: () => Promise<string | void>, options: { main?: boolean; disabled?: boolean; label?: string } = {}): HTMLButtonElement {
  return element("button", {
    type: "button",
    class: options.main ? "main" : undefined,
    disabled: options.disabled,
    "aria-label": options.label,
    click: () => void attempt(work),
  }, text);
}
