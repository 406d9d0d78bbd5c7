/* Runs beside the page, in the thread that plays: hands over blocks of the microphone, and plays what comes back.

What comes back waits in a queue. It begins to play once `START_SECONDS` are there, so that blocks may come unevenly. If
the queue runs dry, it waits for as much again; if it grows beyond `MAX_SECONDS`, its oldest sound is dropped. */

const START_SECONDS = 0.04, MAX_SECONDS = 0.25, REPORT_SECONDS = 0.25;

registerProcessor("ear", class extends AudioWorkletProcessor {
  constructor({processorOptions}) {
    super();
    this.block = new Int16Array(processorOptions.block);
    this.filled = 0;
    this.queue = [];
    this.waiting = 0;
    this.isPlaying = false;
    this.counts = {dry: 0, dropped: 0};
    this.reported = 0;
    this.port.onmessage = ({data}) => {
      this.queue.push(data);
      this.waiting += data.length;
      while (this.waiting > MAX_SECONDS * sampleRate) {
        this.waiting -= this.queue.shift().length;
        this.counts.dropped += 1;
      }
    };
  }

  hear(samples) {
    for (const value of samples) {
      this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(32768 * value)));
      if (this.filled < this.block.length) continue;
      this.port.postMessage({block: this.block.slice().buffer});
      this.filled = 0;
    }
  }

  play(output) {
    if (!this.isPlaying && this.waiting < START_SECONDS * sampleRate) return;
    this.isPlaying = true;
    let at = 0;
    while (at < output.length && this.queue.length) {
      const first = this.queue[0], count = Math.min(first.length, output.length - at);
      output.set(first.subarray(0, count), at);
      at += count;
      if (count < first.length) this.queue[0] = first.subarray(count); else this.queue.shift();
    }
    this.waiting -= at;
    if (at === output.length) return;
    this.isPlaying = false;
    this.counts.dry += 1;
  }

  process([[heard]], [[output]]) {
    this.hear(heard ?? new Float32Array(output.length));
    this.play(output);
    if (currentTime - this.reported >= REPORT_SECONDS) {
      this.reported = currentTime;
      this.port.postMessage({queued: this.waiting / sampleRate, ...this.counts});
    }
    return true;
  }
});
