// Runs a student, in a worker that has no connection of its own: its server's answer forbids it every one (gate.py).
// It gets ONNX Runtime's WebAssembly and the models as bytes, and clips one by one.

import * as ort from "onnxruntime-web/wasm";

const MODELS = ["spectrogram", "picture", "audio_encoder", "visual_encoder", "local_head"] as const;
type Model = (typeof MODELS)[number];

/** A square picture: its side in pixels, and its levels, (side, side, RGB). */
export interface Square {
  side: number;
  levels: Uint8Array;
}

export type Wanted =
  | { kind: "open"; wasm: ArrayBuffer; models: Record<Model, ArrayBuffer> }
  | { kind: "clip"; number: number; sound: Float32Array | null; pictures: Square[] | null };

export type Made =
  | { kind: "opened" }
  | { kind: "answer"; number: number; probabilities: number[]; features: number[][]; spectrogram: Float32Array | null; ms: Record<string, number> }
  | { kind: "failed"; text: string };

let sessions: Record<Model, ort.InferenceSession>;

const tell = (made: Made): void => self.postMessage(made);

async function open(wasm: ArrayBuffer, models: Record<Model, ArrayBuffer>): Promise<void> {
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const made: Partial<Record<Model, ort.InferenceSession>> = {};
  // One after the other: two at once would hold the bytes of two models twice.
  for (const name of MODELS) made[name] = await ort.InferenceSession.create(new Uint8Array(models[name]));
  sessions = made as Record<Model, ort.InferenceSession>;
}

async function run(model: Model, ...inputs: ort.Tensor[]): Promise<ort.Tensor> {
  const session = sessions[model];
  const made = await session.run(Object.fromEntries(session.inputNames.map((name, place) => [name, inputs[place]!])));
  return made[session.outputNames[0]!]!;
}

const floats = (values: Float32Array, shape: number[]): ort.Tensor => new ort.Tensor("float32", values, shape);

async function answer(number: number, sound: Float32Array | null, pictures: Square[] | null): Promise<void> {
  const ms: Record<string, number> = {};
  async function timed<Value>(what: string, work: () => Promise<Value>): Promise<Value> {
    const began = performance.now();
    const value = await work();
    ms[what] = performance.now() - began;
    return value;
  }
  let spectrogram: ort.Tensor | null = null;
  let heard: Float32Array | null = null, seen: Float32Array | null = null;
  if (sound) {
    spectrogram = await timed("spectrogram", () => run("spectrogram", floats(sound, [sound.length])));
    heard = (await timed("sound", () => run("audio_encoder", spectrogram!))).data as Float32Array;
  }
  if (pictures) {
    const frames = await timed("pictures prepared", () => prepared(pictures));
    seen = (await timed("pictures", () => run("visual_encoder", frames))).data as Float32Array;
  }
  const size = (heard ?? seen)!.length;
  const features = [heard ?? new Float32Array(size), seen ?? new Float32Array(size)];
  const present = Float32Array.of(heard ? 1 : 0, seen ? 1 : 0);
  const given = [...features.map((vector) => floats(vector, [1, size])), floats(present, [1, 2])];
  const probabilities = await timed("answer", () => run("local_head", ...given));
  tell({
    kind: "answer",
    number,
    probabilities: [...(probabilities.data as Float32Array)],
    features: features.map((vector) => [...vector]),
    spectrogram: spectrogram ? (spectrogram.data as Float32Array) : null,
    ms,
  });
}

async function prepared(pictures: Square[]): Promise<ort.Tensor> {
  const frames: ort.Tensor[] = [];
  for (const { side, levels } of pictures) frames.push(await run("picture", new ort.Tensor("uint8", levels, [side, side, 3])));
  const [first] = frames;
  const all = new Float32Array(frames.length * first!.size);
  frames.forEach((frame, place) => all.set(frame.data as Float32Array, place * first!.size));
  return floats(all, [1, frames.length, ...first!.dims]);
}

self.onmessage = (event: MessageEvent<Wanted>): void => {
  const wanted = event.data;
  const work =
    wanted.kind === "open"
      ? open(wanted.wasm, wanted.models).then(() => tell({ kind: "opened" }))
      : answer(wanted.number, wanted.sound, wanted.pictures);
  work.catch((error) => tell({ kind: "failed", text: error instanceof Error ? error.message : String(error) }));
};
