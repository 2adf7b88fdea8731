// Runs where the sound is: passes the microphone's samples on, the mean of its channels, in blocks of about 60 ms.

declare const registerProcessor: (name: string, of: new () => AudioWorkletProcessor) => void;
declare class AudioWorkletProcessor {
  readonly port: MessagePort;
}

const BLOCK = 1024;

class Recorder extends AudioWorkletProcessor {
  private block = new Float32Array(BLOCK);
  private filled = 0;
  private ended = false;

  constructor() {
    super();
    this.port.onmessage = () => (this.ended = true);
  }

  process(inputs: Float32Array[][]): boolean {
    const channels = inputs[0] ?? [];
    const count = channels[0]?.length ?? 0;
    for (let at = 0; at < count; at++) {
      let sum = 0;
      for (const channel of channels) sum += channel[at]!;
      this.block[this.filled++] = sum / channels.length;
      if (this.filled === BLOCK) {
        this.port.postMessage(this.block, [this.block.buffer]);
        this.block = new Float32Array(BLOCK);
        this.filled = 0;
      }
    }
    return !this.ended;
  }
}

registerProcessor("recorder", Recorder);
