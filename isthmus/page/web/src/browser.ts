// The student in this browser: it is fetched, every connection is given up, and only then camera and microphone open.

import "./page.css";
import { fetched, student } from "./api";
import { bars, lines, spectrogram, type Line } from "./draw";
import { element, put, say, section, table } from "./dom";
import { Listener, opened, Watcher } from "./senses";
import type { Made, Square, Wanted } from "./student";
import { attempt, tell } from "./view";
import { bytes, count, percent, seconds, which } from "./words";

const WASM = "./ort-wasm-simd-threaded.wasm";
const SHOWN = 30;
const LOOK_EVERY_MS = 100;
const SOON_MS = 50;
/** The page may fetch nothing any more, wherever from. It cannot take this back. */
const ALONE = "default-src 'none'; style-src 'self'";

const state = document.getElementById("state")!;
const main = document.getElementById("main")!;

function warn(text: string): void {
  say(state, text);
  state.className = "warn";
}

function now(text: string): void {
  say(state, text);
  state.className = "";
}

/** The student's worker, asked one thing at a time. */
class Student {
  private readonly worker = new Worker("./student.js", { type: "module", name: "student" });

  ask(wanted: Wanted, passed: Transferable[]): Promise<Made> {
    return new Promise((done, failed) => {
      this.worker.onmessage = (event: MessageEvent<Made>) =>
        event.data.kind === "failed" ? failed(new Error(`The student does not run in this browser: ${event.data.text}`)) : done(event.data);
      this.worker.onerror = (event) => failed(new Error(`The student does not run in this browser: ${event.message}`));
      this.worker.postMessage(wanted, passed);
    });
  }
}

interface Ready {
  student: Student;
  listener: Listener;
  watcher: Watcher;
}

async function begin(): Promise<void> {
  const facts = await student();
  const sizes: Record<string, number> = facts.files;
  const all = Object.values(sizes).reduce((sum, size) => sum + size, 0);
  const camera = element("canvas", { class: "picture", role: "img", "aria-label": "the square that the student sees", width: 240, height: 240 });
  const cameraSaid = element("p", { class: "quiet" }, "The camera is closed.");
  const sound = element("canvas", { class: "sound", role: "img", "aria-label": "spectrogram of the last clip", width: 150, height: 64 });
  const soundSaid = element("p", { class: "quiet" }, "The microphone is closed.");
  const label = element("p", { class: "big" }, "–");
  const how = element("p", {}, "No clip has been answered yet.");
  const shares = element("div");
  const trend = element("div");
  const trendSaid = element("p", { class: "quiet" });
  const times = element("div", {}, element("p", { class: "quiet" }, "–"));
  const load = element("progress", { max: all, value: 0, "aria-label": "bytes of the student that are here", hidden: true });
  const start = element("button", { type: "button", class: "main", click: () => void attempt(run) }, "Start");
  const stop = element("button", { type: "button", click: () => halt(), disabled: true }, "Stop");
  const prove = element("button", { type: "button", click: () => void attempt(tried), disabled: true }, "Try to send one byte");
  const past: { at: number; probabilities: number[] }[] = [];
  let ready: Ready | undefined;
  let running = 0;
  let streams: MediaStream[] = [];

  main.replaceChildren(
    element(
      "div",
      { class: "cards" },
      section(
        "What happens here", "wide",
        element("p", {}, `"${facts.name}" runs in this browser, on this machine's processor. No picture, no sound, no feature and no answer leaves this page.`),
        element("p", {}, `Start fetches the student and all that runs it, ${bytes(all)} and about 4 MB of ONNX Runtime, from the server of this page. Then the page gives up every connection, to that server too, and only then the camera and the microphone open. Your browser enforces this; the page cannot take it back.`),
        element("p", {}, "Nothing is kept: it ends with this page. What a device has learned of you is not used here, and the page looks for no face: fill the square with yours, or the answer means little."),
        element("div", { class: "row" }, start, stop, prove),
        load,
      ),
      section("Answer", "", label, how, shares),
      section("Camera", "", camera, cameraSaid),
      section("Sound", "", sound, soundSaid),
      section("Answers over time", "wide", trend, trendSaid),
      section("Time of the last clip", "wide", times),
    ),
  );
  now("Nothing has been opened yet.");

  async function prepare(): Promise<Ready> {
    const student = new Student();
    load.hidden = false;
    let here = 0;
    const models: Record<string, ArrayBuffer> = {};
    for (const name of Object.keys(sizes))
      models[name] = await fetched(`./api/student/${name}.onnx`, (more) => {
        load.value = here += more;
        now(`Fetching the student: ${bytes(here)} of ${bytes(all)}.`);
      });
    now("Fetching ONNX Runtime.");
    const wasm = await fetched(WASM, () => undefined);
    const listener = await Listener.ready(facts.sample_rate_hz, facts.samples);
    now("Loading the student.");
    await student.ask({ kind: "open", wasm, models: models as any }, [wasm, ...Object.values(models)]);
    document.head.append(element("meta", { "http-equiv": "Content-Security-Policy", content: ALONE }));
    load.hidden = true;
    prove.disabled = false;
    return { student, listener, watcher: new Watcher(facts.duration_s + 1) };
  }

  async function run(): Promise<void> {
    start.disabled = true;
    try {
      ready = ready ?? (await prepare());
      now("The page has no connection any more. Opening camera and microphone.");
      const { camera: seen, microphone: heard, trouble } = await opened();
      streams = [seen, heard].filter((each) => each !== null);
      if (!streams.length) throw new Error(`${trouble.join(" ")} Allow one of them in the browser's settings of this page, and press Start again.`);
      if (seen) await ready.watcher.watch(seen);
      if (heard) await ready.listener.listen(heard);
      for (const stream of streams) for (const track of stream.getTracks()) track.onended = () => showSenses([]);
      stop.disabled = false;
      const life = ++running;
      showSenses(trouble);
      void look(life);
      void answers(life, ready);
    } catch (error) {
      halt();
      warn(error instanceof Error ? error.message : String(error));
    }
  }

  function halt(): void {
    running++;
    for (const stream of streams) for (const track of stream.getTracks()) track.stop();
    streams = [];
    ready?.watcher.stop();
    ready?.listener.stop();
    start.disabled = false;
    stop.disabled = true;
    say(cameraSaid, "The camera is closed.");
    say(soundSaid, "The microphone is closed.");
    camera.getContext("2d")!.clearRect(0, 0, camera.width, camera.height);
    if (ready) now("Camera and microphone are closed. This page still has no connection.");
  }

  const live = (kind: string): boolean => streams.some((stream) => stream.getTracks().some((track) => track.kind === kind && track.readyState === "live"));

  function showSenses(trouble: string[]): void {
    if (!streams.length) return;
    const seen = live("video"), heard = live("audio");
    if (!seen) ready?.watcher.stop();
    if (!heard) ready?.listener.stop();
    const words = trouble.length ? trouble : [!seen && streams.length && "The camera is gone.", !heard && "The microphone is gone."].filter((each) => each);
    if (seen && heard) now("The student runs in this browser. The page has no connection.");
    else if (!seen && !heard) {
      halt();
      warn("Camera and microphone are gone. Plug one of them in and press Start again.");
    } else warn(`${words.join(" ")} ${seen ? "The picture" : "The sound"} alone is answered. The page has no connection.`);
    say(cameraSaid, seen ? "The square is what the student sees. Fill it with your face." : "The camera gives no picture.");
    say(soundSaid, heard ? `Waiting for the first ${seconds(facts.duration_s)} of sound.` : "The microphone gives no sound.");
  }

  async function look(life: number): Promise<void> {
    while (life === running) {
      const square = ready!.watcher.newest;
      if (square && !document.hidden) drawSquare(camera, square);
      await pause(LOOK_EVERY_MS);
    }
  }

  async function answers(life: number, { student, listener, watcher }: Ready): Promise<void> {
    for (let number = 1; life === running; ) {
      const heard = live("audio") ? await listener.clip() : null;
      const seen = live("video") ? watcher.clip(facts.frame_times_s, facts.duration_s) : null;
      // A clip begins when all that is open has given enough.
      if ((live("audio") && !heard) || (live("video") && !seen) || (!heard && !seen)) {
        await pause(SOON_MS);
        continue;
      }
      const began = performance.now();
      let made: Made;
      try {
        made = await student.ask({ kind: "clip", number: number++, sound: heard, pictures: seen }, heard ? [heard.buffer] : []);
      } catch (error) {
        if (life === running) {
          halt();
          warn(error instanceof Error ? error.message : String(error));
        }
        return;
      }
      if (life === running && made.kind === "answer") show(made, Boolean(heard), Boolean(seen), performance.now() - began);
      await pause(SOON_MS);
    }
  }

  function show(made: Made & { kind: "answer" }, heard: boolean, seen: boolean, tookMs: number): void {
    const classes: string[] = facts.classes, shown = made.probabilities;
    say(label, classes[shown.indexOf(Math.max(...shown))]!);
    say(how, `Answered in this browser from ${which(heard, seen)}, in ${seconds(tookMs / 1000)}. Nothing was sent.`);
    const pairs = classes.map((name, place): [string, number] => [name, shown[place]!]);
    put(shares, bars(pairs, 1, `probabilities: ${pairs.map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`, percent));
    past.push({ at: performance.now() / 1000, probabilities: shown });
    if (past.length > SHOWN) past.shift();
    if (past.length > 1) {
      const over: Line[] = classes.map((name, place) => ({ name, points: past.map((each) => [each.at, each.probabilities[place]!]) }));
      const labels = past.map((each) => classes[each.probabilities.indexOf(Math.max(...each.probabilities))]);
      const words = `The last ${count(past.length, "answer")}, oldest first: ${labels.join(", ")}.`;
      put(trend, lines(over, 1, words, percent));
      say(trendSaid, words);
    }
    if (made.spectrogram) {
      const [bins, columns] = facts.spectrogram as [number, number];
      spectrogram(sound, levels(made.spectrogram), bins, columns);
      say(soundSaid, `The last ${seconds(facts.duration_s)} of sound, as the student reads it: low tones below, high ones above.`);
    }
    put(times, table(["part", "milliseconds"], Object.entries(made.ms).map(([name, ms]) => [name, ms.toFixed(0)]), [1]));
  }

  /** Show that the browser refuses a connection, now that the page has given them up. */
  async function tried(): Promise<string> {
    const refused = new Promise<string>((done) =>
      document.addEventListener("securitypolicyviolation", (event) => done(`Your browser refused: "${event.effectiveDirective}" of this page allows no connection. Nothing was sent.`), { once: true }),
    );
    const sent = fetch("./api/page").then(() => "A byte was sent. This must not be: close this page and tell its makers.");
    return Promise.any([refused, sent]);
  }
}

function drawSquare(canvas: HTMLCanvasElement, { side, levels }: Square): void {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d")!;
  const picture = context.createImageData(side, side);
  for (let from = 0, to = 0; from < levels.length; to += 4) {
    picture.data[to] = levels[from++]!;
    picture.data[to + 1] = levels[from++]!;
    picture.data[to + 2] = levels[from++]!;
    picture.data[to + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

/** Numbers as levels of grey, as a device shows them: from the quietest to 3 standard deviations above the mean. */
function levels(values: Float32Array): Uint8Array {
  let mean = 0, square = 0, quietest = Infinity;
  for (const value of values) mean += value / values.length;
  for (const value of values) {
    square += (value - mean) ** 2 / values.length;
    quietest = Math.min(quietest, value);
  }
  const brightest = mean + 3 * Math.sqrt(square) + 1e-9;
  return Uint8Array.from(values, (value) => Math.max(0, Math.min(255, Math.round((255 * (value - quietest)) / (brightest - quietest)))));
}

const pause = (ms: number): Promise<void> => new Promise((done) => window.setTimeout(done, ms));

begin().catch((error: Error) => {
  warn(error.message);
  tell("");
});
