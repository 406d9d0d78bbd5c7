/* What all parts of the page need: requests, errors, files, and the microphone. */

export const $ = (selector) => document.querySelector(selector);
export const all = (selector, from = document) => [...from.querySelectorAll(selector)];
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const show = (selector, isShown) => { $(selector).hidden = !isShown; };
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
export const clamp = (value, low, high) => Math.max(low, Math.min(value, high));

/* Requests. Errors are problem details; their `detail` is for people. */

export const problemOf = (text, status) => {
  try { return new Error(JSON.parse(text).detail); } catch { return new Error(`The server answered with status ${status}`); }
};

export const call = async (method, path, body) => {
  let answer;
  try { answer = await fetch(path, {method, body}); } catch { throw new Error("The server does not answer; is it still running?"); }
  if (!answer.ok) throw problemOf(await answer.text(), answer.status);
  return answer.status === 204 ? null : answer.json();
};

/* XMLHttpRequest tells how much of an upload has arrived; fetch does not. */
export const send = (path, form, report) => new Promise((resolve, reject) => {
  const request = new XMLHttpRequest();
  request.open("POST", path);
  request.upload.onprogress = (event) => event.lengthComputable && report(event.loaded / event.total);
  request.onerror = () => reject(new Error("The upload broke off; is the server still running?"));
  request.onload = () => {
    if (request.status < 300) resolve(JSON.parse(request.responseText));
    else reject(problemOf(request.responseText, request.status));
  };
  request.send(form);
});

export const formOf = (fields) => {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null && value !== undefined) form.append(name, value);
  return form;
};

export const complain = (error) => {
  $("#error").textContent = error === null ? "" : `${error.message}.`.replace(/\.\.$/, ".");
  show("#error", error !== null);
  if (error !== null) $("#error").scrollIntoView({block: "nearest"});
};

/* Runs what an event starts; its error is shown. */
export const when = (target, type, work) => (typeof target === "string" ? $(target) : target).addEventListener(type, async (event) => {
  try { complain(null); await work(event); } catch (error) { complain(error); }
});

export const button = (text, label, work, kinds = "") => {
  const made = document.createElement("button");
  Object.assign(made, {type: "button", textContent: text, className: kinds, ariaLabel: label});
  when(made, "click", work);
  return made;
};

export const openMicrophone = async () => {
  if (!navigator.mediaDevices) throw new Error("The browser gives the microphone only to https pages and to localhost");
  try { return await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: false, noiseSuppression: false, autoGainControl: false}}); }
  catch { throw new Error("The microphone cannot be used; allow it in the browser, or choose a file"); }
};

/* Sounds from the microphone become a WAV file, which every server can read. */

const toWav = async (blob) => {
  const context = new AudioContext();
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  context.close();
  const samples = sound.getChannelData(0), view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (place, word) => [...word].forEach((sign, index) => view.setUint8(place + index, sign.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, sound.sampleRate, true); view.setUint32(28, 2 * sound.sampleRate, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, index) => view.setInt16(44 + 2 * index, clamp(value, -1, 1) * 32767, true));
  return new File([view.buffer], "microphone.wav", {type: "audio/wav"});
};

export const recordTo = (selector, take) => {
  const button = $(selector), label = button.querySelector("span:last-child");
  let recorder = null;
  when(button, "click", async () => {
    if (recorder !== null) { recorder.stop(); return; }
    const stream = await openMicrophone();
    const pieces = [], begin = Date.now();
    const tick = setInterval(() => { label.textContent = `Stop (${clock((Date.now() - begin) / 1000).slice(0, -2)})`; }, 200);
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = async () => {
      clearInterval(tick);
      const type = recorder.mimeType;
      recorder = null;
      stream.getTracks().forEach((track) => track.stop());
      button.classList.remove("recording");
      label.textContent = "Record";
      try { await take(await toWav(new Blob(pieces, {type}))); } catch (error) { complain(error); }
    };
    recorder.start();
    button.classList.add("recording");
    label.textContent = "Stop (0:00)";
  });
};

export const takeFiles = (area, input, take) => {
  const target = $(area), chooser = $(input);
  when(chooser, "change", async () => { const [file] = chooser.files; chooser.value = ""; if (file) await take(file); });
  for (const type of ["dragenter", "dragover"]) target.addEventListener(type, (event) => { event.preventDefault(); target.classList.add("over"); });
  target.addEventListener("dragleave", () => target.classList.remove("over"));
  when(target, "drop", async (event) => {
    event.preventDefault();
    target.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) await take(file);
  });
};
