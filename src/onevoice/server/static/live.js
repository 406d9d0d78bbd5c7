/* Live sound: the microphone goes to /v1/stream in blocks, and comes back as one voice. */

import {$, all, call, clock, complain, formOf, openMicrophone, recordTo, send, show, takeFiles, when} from "./page.js";

const BLOCK_SECONDS = 0.02, FLOOR_DB = -60, MAX_BEHIND_SECONDS = 0.3, SHOW_SECONDS = 0.25;

const run = {server: null, socket: null, close: null, upload: null};

const kind = () => $("input[name=live-kind]:checked").value;

/* What the server is told about the voice; nothing if none is chosen in the open pane. */
const chosenVoice = () => {
  if (kind() === "recording") return {recording: run.upload};
  if (kind() === "voice") return {voice: $("input[name=live-voice]:checked")?.value ?? null};
  return {voice: null};
};
const strength = () => +$("#live-strength").value / 100;

const tell = (change) => { if (run.socket?.readyState === WebSocket.OPEN) run.socket.send(JSON.stringify(change)); };

const sayState = (text) => { if ($("#live-state").textContent !== text) $("#live-state").textContent = text; };

const sayReady = (answer) => {
  sayState(answer.has_voice ? "Running: the voice comes through." : "Running: everything passes through, because no voice is chosen.");
  const notes = answer.check_up === null || kind() !== "recording" ? [] : answer.check_up.warnings;
  $("#live-notes").replaceChildren(...notes.map((note) => Object.assign(document.createElement("li"), {textContent: `${note[0].toUpperCase()}${note.slice(1)}.`})));
};

const changeVoice = () => {
  for (const pane of all(".live-pane")) pane.hidden = pane.dataset.kind !== kind();
  if (run.socket === null) return;
  sayState("Listening to the recording of the person…");
  tell(chosenVoice());
};

/* Meters show the highest peak since they were drawn last. */
class Meter {
  constructor(selector) {
    [this.bar, this.output, this.peak] = [$(selector), $(`${selector} + output`), 0];
  }

  add(samples) { for (const value of samples) this.peak = Math.max(this.peak, Math.abs(value)); }

  draw() {
    const level = Math.max(FLOOR_DB, 20 * Math.log10(this.peak / 32768 + 1e-9)), isSilent = level <= FLOOR_DB;
    this.bar.style.setProperty("--share", 1 - level / FLOOR_DB);
    this.bar.setAttribute("aria-valuenow", level.toFixed(0));
    this.bar.setAttribute("aria-valuetext", isSilent ? "silence" : `${level.toFixed(0)} dB`);
    this.output.textContent = isSilent ? "silence" : `${level.toFixed(0)} dB`.replace("-", "−");
    this.peak = 0;
  }
}

/* The time from the microphone to the loudspeaker: samples come back in their order, so the count of those that came
   tells when they were sent. */
class Latency {
  constructor(rate) { [this.rate, this.sent, this.came, this.times, this.seconds] = [rate, 0, 0, [], null]; }

  /* Seconds that were sent and did not come back yet. */
  get behind() { return (this.sent - this.came) / this.rate; }

  send(count) { this.sent += count; this.times.push([this.sent, performance.now()]); }

  come(count) {
    this.came += count;
    let time = null;
    while (this.times.length && this.times[0][0] <= this.came) [, time] = this.times.shift();
    if (time === null) return;
    const now = (performance.now() - time) / 1000 + BLOCK_SECONDS;
    this.seconds = this.seconds === null ? now : 0.9 * this.seconds + 0.1 * now;
  }
}

const follow = (socket, node, context) => {
  const meters = [new Meter("#live-in"), new Meter("#live-out")], latency = new Latency(context.sampleRate);
  let played = {queued: 0, dry: 0, dropped: 0}, own = null, unsent = 0;  // the server is ready once its own latency is known
  node.port.onmessage = ({data}) => {
    if (data.block === undefined) { played = data; return; }
    meters[0].add(new Int16Array(data.block));
    if (own === null || socket.readyState !== WebSocket.OPEN) return;
    if (latency.behind > own + MAX_BEHIND_SECONDS) { unsent += 1; return; }  // or it would come later and later
    latency.send(data.block.byteLength / 2);
    socket.send(data.block);
  };
  socket.addEventListener("message", ({data}) => {
    if (typeof data === "string") {
      const answer = JSON.parse(data);
      if (answer.type === "ready") { own = answer.latency_seconds; sayReady(answer); }
      return;
    }
    const samples = new Int16Array(data);
    meters[1].add(samples);
    latency.come(samples.length);
    node.port.postMessage(Float32Array.from(samples, (value) => value / 32768));
  });
  const tick = setInterval(() => {
    for (const meter of meters) meter.draw();
    const rest = played.queued + (context.outputLatency || context.baseLatency || 0);
    if (latency.seconds !== null) $("#live-latency").textContent = `${Math.round(1000 * (latency.seconds + rest))} ms, of which the network needs ${Math.round(1000 * own)} ms`;
    const trouble = [[unsent, "blocks were left out because the server is too slow"], [played.dropped, "blocks came too late"], [played.dry, "times the sound ran out"]].filter(([count]) => count > 0);
    $("#live-trouble").textContent = trouble.map(([count, text]) => `${count} ${text}`).join("; ");
  }, 1000 * SHOW_SECONDS);
  return () => {
    clearInterval(tick);
    for (const meter of meters) { meter.peak = 0; meter.draw(); }
    $("#live-latency").textContent = "–";
  };
};

const stop = (state = "Not running.") => {
  run.close?.();
  run.close = null;
  run.socket = null;
  sayState(state);
  $("#live-toggle").classList.remove("recording");
  $("#live-toggle span:last-child").textContent = "Start";
};

const connect = (rate) => {
  const socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/v1/stream`);
  socket.binaryType = "arraybuffer";
  let problem = null;
  socket.addEventListener("open", () => socket.send(JSON.stringify({sample_rate: rate, strength: strength(), ...chosenVoice()})));
  socket.addEventListener("message", ({data}) => {
    if (typeof data !== "string") return;
    const answer = JSON.parse(data);
    if (answer.type === "problem") { problem = new Error(answer.problem.detail); complain(problem); sayState("Running, with the last voice."); }
  });
  socket.addEventListener("close", ({reason}) => {
    if (run.socket !== socket) return;  // stopped by the user
    stop("Not running: the server ended the stream.");
    complain(problem ?? new Error(reason || "The connection broke off; is the server still running?"));
  });
  return socket;
};

const begin = async () => {
  const closing = [], close = run.close = () => { while (closing.length) closing.pop()(); };
  const isStopped = () => run.close !== close;  // by the user, while this waits
  try {
    const stream = await openMicrophone();
    closing.push(() => stream.getTracks().forEach((track) => track.stop()));
    const context = new AudioContext({latencyHint: "interactive"});
    closing.push(() => context.close());
    await context.audioWorklet.addModule("/static/ear.js");
    const node = new AudioWorkletNode(context, "ear", {numberOfInputs: 1, numberOfOutputs: 1, outputChannelCount: [1], channelCount: 1, channelCountMode: "explicit", processorOptions: {block: Math.round(BLOCK_SECONDS * context.sampleRate)}});
    const volume = new GainNode(context, {gain: $("#live-listen").checked ? 1 : 0});
    $("#live-listen").onchange = () => { volume.gain.value = $("#live-listen").checked ? 1 : 0; };
    context.createMediaStreamSource(stream).connect(node).connect(volume).connect(context.destination);
    await context.resume();
    if (isStopped()) { close(); return; }
    $("#live-toggle").classList.add("recording");
    $("#live-toggle span:last-child").textContent = "Stop";
    sayState("Connecting…");
    const socket = run.socket = connect(context.sampleRate);  // last: what closes it resets the button
    closing.push(() => socket.close(), follow(socket, node, context));
  } catch (error) {
    close();
    if (isStopped()) return;
    stop();
    throw error;
  }
};

const takeVoice = async (file) => {
  $("#live-name").textContent = `Sending ${file.name}`;
  try {
    const old = run.upload;
    const upload = await send("/v1/recordings", formOf({recording: file}), () => {});
    if (old !== null) await call("DELETE", `/v1/recordings/${old}`).catch(() => {});  // it may have expired
    run.upload = upload.id;
    $("#live-name").textContent = `${file.name}, ${clock(upload.seconds)}`;
  } catch (error) {
    $("#live-name").textContent = "Or drop it here.";
    throw error;
  }
  changeVoice();
};

const listVoices = async () => {
  const voices = await call("GET", "/v1/voices"), chosen = $("input[name=live-voice]:checked")?.value;
  $("#live-voices-note").textContent = voices.length ? "Voices that were saved on this server." : "No voice is saved on this server. After an extraction from a recording, you can save its voice.";
  $("#live-voices").replaceChildren(...voices.map((voice) => {
    const line = document.createElement("li"), label = document.createElement("label"), radio = document.createElement("input");
    Object.assign(radio, {type: "radio", name: "live-voice", value: voice.id, disabled: !voice.fits_live, checked: voice.id === chosen});
    radio.addEventListener("change", changeVoice);
    label.append(radio, voice.fits_live ? voice.name : `${voice.name} (saved without the live network; save it once more)`);
    line.append(label);
    return line;
  }));
};

/* Shows the live part. */
export const openLive = async () => { if (run.server.has_live) await listVoices(); };

/* Prepares the live part for a server, once it is known. */
export const startLive = (server) => {
  const isFirst = run.server === null;
  run.server = server;
  show("#live-missing", !server.has_live);
  show("#live-work", server.has_live);
  if (!isFirst) return;
  when("#live-toggle", "click", async () => { if (run.close === null) await begin(); else stop(); });
  when("#live-strength", "input", () => {
    $("#live-strength + output").textContent = `${$("#live-strength").value} %`;
    tell({strength: strength()});
  });
  for (const radio of all("input[name=live-kind]")) when(radio, "change", changeVoice);
  takeFiles("#live-drop", "#live-file", takeVoice);
  recordTo("#live-record", takeVoice);
};
