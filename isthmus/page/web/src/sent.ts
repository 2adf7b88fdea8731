// What left this device: every message in order of time, its bytes, and what it held.

import { ask, type Facts } from "./api";
import { bars, columns } from "./draw";
import { element, put, section, table } from "./dom";
import { attempt, type View } from "./view";
import { bytes, count, day, percent, signed } from "./words";

const PAGE = 50;

export function sent(): View {
  const totals = element("div");
  const list = element("ul", { class: "list" });
  const more = element("div", { class: "row" });

  async function refresh(): Promise<void> {
    const facts = await ask("sent", { before: 0, most: PAGE });
    const of: [string, [number, number]][] = Object.entries(facts.totals);
    const all = of.reduce((sum, [, pair]) => sum + pair[1], 0);
    const messages = of.reduce((sum, [, pair]) => sum + pair[0], 0);
    put(totals, 
      element("p", { class: "big" }, `${bytes(all)} in ${count(messages, "message")}`),
      element("p", {}, "These are all messages that this device has written to its cloud, since the first. No message can hold sound or pictures: the contract has none for them."),
      element("p", { class: "quiet" }, "A message is listed before it goes, so one that was lost on the way is here too. Bytes are those of the message. HTTP/2 adds a few around each, with this device's token and the student's name, and TLS adds more."),
      facts.unwritten > 0 && element("p", {}, `${count(facts.unwritten, "message")} could not be written down, because the disk was full or damaged.`),
      of.length > 0 && table(["what", "messages", "bytes"], of.map(([name, pair]) => [title(name), String(pair[0]), bytes(pair[1])]), [1, 2]),
    );
    put(list);
    add(facts.messages);
  }

  function add(messages: Facts[]): void {
    list.append(...messages.map(item));
    const last = messages.at(-1);
    put(more, 
      ...(messages.length === PAGE && last
        ? [element("button", { type: "button", click: () => void attempt(async () => add((await ask("sent", { before: last.number, most: PAGE })).messages)) }, "Show older ones")]
        : [element("p", { class: "quiet" }, list.childElementCount ? "That is all that is listed one by one." : "Nothing has left this device yet.")]),
    );
  }

  return {
    title: "What left this device",
    content: element("div", { class: "cards" }, section("All together", "wide", totals), section("One by one, newest first", "wide", list, more)),
    refresh,
    every: 3,
  };
}

function item(message: Facts): HTMLElement {
  const shown = element("div");
  const details = element("details", {}, element("summary", {}, `${day(message.sent_s)}: ${title(message.name)}, ${bytes(message.size_bytes)}`), shown);
  details.addEventListener("toggle", () => {
    if (!details.open || shown.childElementCount) return;
    shown.append(element("p", {}, held(message)));
    if (message.sha256) shown.append(element("p", { class: "quiet" }, `SHA-256 ${message.sha256}`));
    else shown.append(element("p", { class: "quiet" }, "It may hold a secret key, so neither its bytes nor its hash are kept."));
    if (message.sha256)
      shown.append(element("button", { type: "button", "aria-label": `show the ${message.size_bytes} bytes of message ${message.number}`, click: (event) => void attempt(() => content(message, event.currentTarget as HTMLElement, shown)) }, "Show its bytes"));
  });
  return element("li", { "data-number": message.number, "data-bytes": message.size_bytes }, details);
}

async function content(message: Facts, button: HTMLElement, shown: HTMLElement): Promise<string> {
  const facts = await ask("sent_content", { number: message.number });
  const numbers: [string, number[]][] = facts.numbers;
  const isFeatures = message.name === "InferRequest";
  for (const [what, values] of numbers.slice(0, 12))
    shown.append(
      element("h3", {}, isFeatures ? `Features of the ${what}` : what),
      isFeatures
        ? columns(values, `${values.length} numbers from ${signed(Math.min(...values))} to ${signed(Math.max(...values))}`)
        : bars(values.map((value, place) => [`class ${place + 1}`, value]), 1, values.map((value) => percent(value)).join(", "), percent),
    );
  if (numbers.length > 12) shown.append(element("p", { class: "quiet" }, `and ${numbers.length - 12} more`));
  shown.append(element("pre", { tabindex: 0, "aria-label": "the bytes as hexadecimal digits" }, facts.hex.replace(/(.{2})(?=.)/g, "$1 ")));
  button.remove();
  return `The ${facts.bytes} bytes of message ${message.number}, as they were sent.`;
}

const TITLES: Record<string, string> = {
  EnrolRequest: "enrolment",
  StartPersonalisationRequest: "prototypes that start a personalisation",
  UploadPrototypesRequest: "prototypes of a later round",
  WatchJobRequest: "question for a job's progress",
  DescribeStudentRequest: "question for a student's manifest",
  FetchStudentRequest: "request for a file of a student",
  ForgetRequest: "request to be forgotten",
  InferRequest: "features of one clip",
};

const title = (name: string): string => TITLES[name] ?? name;

function held(message: Facts): string {
  const facts: Facts = message.held;
  switch (message.name) {
    case "EnrolRequest":
      return `The device's name, "${facts.device_name}"${facts.key ? ", and the cloud's enrolment key" : ""}.`;
    case "StartPersonalisationRequest":
    case "UploadPrototypesRequest":
      return (
        `${count(facts.rows, "average")} of ${facts.classes} class probabilities, made of ${count(facts.clips, "clip")}: ` +
        `none of fewer than ${facts.smallest}. ${facts.epsilon ? `Noise was added, for epsilon ${facts.epsilon}.` : "No noise was added."}` +
        (facts.features ? ` With each went the average of ${facts.features} features.` : "") +
        ` Round ${facts.round + 1}.`
      );
    case "InferRequest":
      return facts.ratio === undefined
        ? "Features of a clip of another student than the one in use."
        : `${facts.numbers} numbers (${facts.number_type}, compressed ${facts.ratio} times) that the student made of ` +
            `${facts.sound && facts.picture ? "the sound and the picture" : facts.sound ? "the sound" : "the picture"} of one clip. ` +
            "Features can give away whose face or voice it was.";
    case "FetchStudentRequest":
      return `The names of a student and of its file ${facts.file}${facts.offset_bytes ? `, from byte ${facts.offset_bytes} on` : ""}.`;
    case "WatchJobRequest":
      return `The job's name, ${facts.job}.`;
    case "DescribeStudentRequest":
      return facts.student ? `The student's name, ${facts.student}.` : "Nothing but the question for the newest student.";
    default:
      return "Nothing else.";
  }
}
