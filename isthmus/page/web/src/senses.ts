// Camera and microphone of the browser: the newest pictures and the newest sound, and what is wrong with either.

import type { Square } from "./student";

const PICTURE_EVERY_MS = 100;
const KEPT_SQUARE_PX = 480;

interface Stamped {
  at: number;
  square: Square;
}

/** The sound of a microphone at one rate: made while the page may still load its recorder, and joined to it later. */
export class Listener {
  private constructor(
    private readonly contexts: AudioContext[],
    private readonly rate: number,
    private readonly samples: number,
  ) {}

  private blocks: Float32Array[] = [];
  private used: AudioContext | undefined;
  private end: () => void = () => undefined;

  /** Load the recorder into two contexts: one of the wanted rate, and one of the sound card's. */
  static async ready(rate: number, samples: number): Promise<Listener> {
    const contexts = [new AudioContext({ sampleRate: rate }), new AudioContext()];
    for (const context of contexts) await context.audioWorklet.addModule("./recorder.js");
    return new Listener(contexts, rate, samples);
  }

  async listen(stream: MediaStream): Promise<void> {
    this.blocks = [];
    for (const context of this.contexts) {
      let source: MediaStreamAudioSourceNode;
      try {
        source = context.createMediaStreamSource(stream);
      } catch {
        continue; // Firefox joins a microphone only to a context of its own rate.
      }
      await context.resume();
      const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
      const longest = Math.ceil((this.samples / this.rate) * context.sampleRate) + context.sampleRate;
      recorder.port.onmessage = (event: MessageEvent<Float32Array>) => {
        this.blocks.push(event.data);
        let held = this.blocks.reduce((sum, block) => sum + block.length, 0);
        while (this.blocks.length && held - this.blocks[0]!.length >= longest) held -= this.blocks.shift()!.length;
      };
      source.connect(recorder);
      this.used = context;
      // A microphone that was closed gives silence for ever, unless its recorder ends.
      this.end = () => {
        source.disconnect();
        recorder.port.onmessage = null;
        recorder.port.postMessage("end");
      };
      return;
    }
    throw new Error("This browser gives no samples of the microphone.");
  }

  stop(): void {
    this.end();
    this.blocks = [];
    void this.used?.suspend();
  }

  /** The samples of one clip that ends now, at the wanted rate; null if there are not so many yet. */
  async clip(): Promise<Float32Array | null> {
    if (!this.used) return null;
    const wanted = Math.round((this.samples / this.rate) * this.used.sampleRate);
    const held = this.blocks.reduce((sum, block) => sum + block.length, 0);
    if (held < wanted) return null;
    const all = new Float32Array(held);
    let at = 0;
    for (const block of this.blocks) {
      all.set(block, at);
      at += block.length;
    }
    const newest = all.slice(held - wanted);
    if (this.used.sampleRate === this.rate) return newest;
    const offline = new OfflineAudioContext(1, this.samples, this.rate);
    const buffer = offline.createBuffer(1, newest.length, this.used.sampleRate);
    buffer.copyToChannel(newest, 0);
    const source = offline.createBufferSource();
    source.buffer = buffer;
    source.connect(offline.destination);
    source.start();
    return (await offline.startRendering()).getChannelData(0).slice();
  }
}

/** The middle square of a camera's newest pictures. */
export class Watcher {
  private readonly video = document.createElement("video");
  private readonly canvas = document.createElement("canvas");
  private pictures: Stamped[] = [];
  private timer = 0;

  constructor(private readonly keptS: number) {
    this.video.muted = true;
    this.video.playsInline = true;
  }

  async watch(stream: MediaStream): Promise<void> {
    this.video.srcObject = stream;
    await this.video.play();
    this.timer = window.setInterval(() => this.take(), PICTURE_EVERY_MS);
  }

  stop(): void {
    window.clearInterval(this.timer);
    this.video.srcObject = null;
    this.pictures = [];
  }

  get newest(): Square | null {
    return this.pictures.at(-1)?.square ?? null;
  }

  /** The pictures that were shown at these times of a clip that ends now, in seconds from its beginning. */
  clip(times: number[], length: number): Square[] | null {
    const began = performance.now() / 1000 - length;
    if (!this.pictures.length || this.pictures[0]!.at > began + times[0]!) return null;
    return times.map((time) => this.pictures.findLast((each) => each.at <= began + time)!.square);
  }

  private take(): void {
    const { videoWidth: width, videoHeight: height } = this.video;
    if (!width || !height) return;
    // Only a large picture is made smaller here; the graph resizes it as the device does.
    const whole = Math.min(width, height), side = Math.min(whole, KEPT_SQUARE_PX);
    this.canvas.width = this.canvas.height = side;
    const context = this.canvas.getContext("2d", { willReadFrequently: true })!;
    context.drawImage(this.video, Math.floor((width - whole) / 2), Math.floor((height - whole) / 2), whole, whole, 0, 0, side, side);
    const seen = context.getImageData(0, 0, side, side).data;
    const levels = new Uint8Array(side * side * 3);
    for (let from = 0, to = 0; from < seen.length; from += 4) {
      levels[to++] = seen[from]!;
      levels[to++] = seen[from + 1]!;
      levels[to++] = seen[from + 2]!;
    }
    const at = performance.now() / 1000;
    this.pictures.push({ at, square: { side, levels } });
    while (this.pictures[1] && this.pictures[1].at < at - this.keptS) this.pictures.shift();
  }
}

/** What camera and microphone give: each of them, one of them, or neither. `trouble` says in words what is not there. */
export interface Opened {
  camera: MediaStream | null;
  microphone: MediaStream | null;
  trouble: string[];
}

// Sound as it is: what a browser takes out for a conversation is part of how a person speaks.
const SOUND = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const PICTURE = { width: { ideal: 640 }, height: { ideal: 480 } };

export async function opened(): Promise<Opened> {
  const trouble: string[] = [];
  async function one(what: string, wanted: MediaStreamConstraints): Promise<MediaStream | null> {
    try {
      return await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      trouble.push(why(what, error instanceof DOMException ? error.name : ""));
      return null;
    }
  }
  try {
    // One question to the person for both.
    const both = await navigator.mediaDevices.getUserMedia({ audio: SOUND, video: PICTURE });
    return { camera: new MediaStream(both.getVideoTracks()), microphone: new MediaStream(both.getAudioTracks()), trouble };
  } catch {
    const camera = await one("camera", { video: PICTURE });
    return { camera, microphone: await one("microphone", { audio: SOUND }), trouble };
  }
}

function why(what: string, name: string): string {
  if (name === "NotAllowedError") return `The ${what} was not allowed.`;
  if (name === "NotFoundError" || name === "OverconstrainedError") return `There is no ${what}.`;
  if (name === "NotReadableError") return `The ${what} is in use by another program, or does not work.`;
  return `The ${what} cannot be opened.`;
}
