import {$, all, button, call, clamp, clock, complain, css, formOf, problemOf, recordTo, send, show, takeFiles, when} from "./page.js";
import {openLive, startLive} from "./live.js";

{
  const MIN_STRETCH = 0.5;

  const state = {server: null, recording: null, region: null, enrollment: null, job: null, events: null, asked: null};

  /* Pictures. */

  const images = new Map();
  const imageOf = async (uri) => {
    if (!images.has(uri)) {
      const image = new Image();
      image.src = uri;
      images.set(uri, image.decode().then(() => image));
    }
    return images.get(uri);
  };

  const prepare = (canvas) => {
    const scale = window.devicePixelRatio || 1, {clientWidth: width, clientHeight: height} = canvas;
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    return [pen, width, height];
  };

  const stepOf = (seconds, count) => [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600].find((step) => seconds / step <= count) ?? 7200;

  /* Waveform above, spectrogram below, times at the bottom; all over the same time. */
  const paintPicture = async (canvas, picture, seconds, color) => {
    const image = await imageOf(picture.spectrogram);
    const [pen, width, height] = prepare(canvas);
    const times = 16, wave = (height - times) * 0.55, middle = wave / 2, columns = picture.low.length;
    pen.imageSmoothingEnabled = true;
    pen.drawImage(image, 0, wave, width, height - times - wave);
    pen.fillStyle = css(color);
    for (let x = 0; x < width; x++) {
      const first = Math.floor(x * columns / width), last = Math.max(first + 1, Math.floor((x + 1) * columns / width));
      const high = Math.max(...picture.high.slice(first, last)), low = Math.min(...picture.low.slice(first, last));
      pen.fillRect(x, middle - high * (middle - 2), 1, Math.max(1, (high - low) * (middle - 2)));
    }
    pen.fillStyle = css("--soft");
    pen.font = "11px system-ui, sans-serif";
    const step = stepOf(seconds, width / 70);
    for (let time = 0; time < seconds; time += step) {
      const x = time / seconds * width;
      pen.fillRect(x, height - times, 1, 4);
      if (x + 30 < width) pen.fillText(step < 1 ? clock(time) : clock(time).slice(0, -2), x + 4, height - 4);
    }
  };

  /* The level of the voice against the mixture, and the stretches in which it is heard. */
  const paintPresence = (canvas, levels, stretches, seconds) => {
    const [pen, width, height] = prepare(canvas);
    const bar = height - 7, top = (level) => bar - (clamp(level, -30, 0) / 30 + 1) * (bar - 3);
    pen.fillStyle = `color-mix(in srgb, ${css("--voice")} 45%, transparent)`;
    pen.beginPath();
    pen.moveTo(0, bar);
    levels.forEach((level, index) => pen.lineTo((index + 0.5) / levels.length * width, top(level)));
    pen.lineTo(width, bar);
    pen.fill();
    pen.fillStyle = css("--voice");
    for (const [begin, end] of stretches) pen.fillRect(begin / seconds * width, bar + 1, Math.max(1, (end - begin) / seconds * width), 6);
  };

  const paintings = new Map();
  const paint = async (canvas, work) => { paintings.set(canvas, work); await work(); };
  const repaint = () => {
    for (const [canvas, work] of paintings) if (!canvas.isConnected) paintings.delete(canvas); else if (canvas.clientWidth) work();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  let width = innerWidth;
  addEventListener("resize", () => { if (width !== innerWidth) { width = innerWidth; repaint(); } });

  /* Players: of all sounds of the page one plays; the tracks of a player share their position. */

  const players = [];

  class Player {
    constructor(transport, seconds, sources) {
      const find = (selector) => transport.querySelector(selector);
      [this.button, this.slider, this.output] = [find(".play"), find(".position"), find(".clock")];
      this.seconds = seconds;
      this.position = 0;
      this.stop = null;
      this.tracks = sources.map(({source, cursor}) => {
        const audio = new Audio();
        audio.preload = "auto";
        audio.src = source;
        audio.addEventListener("ended", () => audio === this.current.audio && this.pause(0));
        return {audio, cursor};
      });
      this.current = this.tracks[0];
      this.button.onclick = () => (this.isPlaying ? this.pause() : this.play().catch(complain));
      this.slider.oninput = () => this.seek(+this.slider.value);
      this.slider.max = seconds;
      players.push(this);
      this.render();
    }

    get isPlaying() { return this.button.classList.contains("playing"); }

    async play(stop = null) {
      for (const other of players) if (other !== this && other.isPlaying) other.pause();
      const {audio} = this.current;
      if (this.position >= this.seconds - 0.05) this.position = 0;
      audio.currentTime = this.position;
      this.stop = stop;
      this.mark(true);
      requestAnimationFrame(() => this.follow());
      try { await audio.play(); } catch (error) {
        this.mark(false);
        if (error.name !== "AbortError") throw new Error("This sound cannot be played");
      }
    }

    pause(position = this.current.audio.currentTime) {
      this.position = position;
      this.current.audio.pause();
      this.mark(false);
      this.render();
    }

    mark(isPlaying) {
      this.button.classList.toggle("playing", isPlaying);
      this.button.setAttribute("aria-label", isPlaying ? "Pause" : "Play");
    }

    seek(seconds) {
      this.position = clamp(seconds, 0, this.seconds);
      this.current.audio.currentTime = this.position;
      this.render();
    }

    choose(index) {
      const wasPlaying = this.isPlaying, stop = this.stop;
      if (wasPlaying) this.pause();
      this.current = this.tracks[index];
      if (wasPlaying) this.play(stop).catch(complain);
    }

    follow() {
      if (!this.isPlaying) return;
      this.position = this.current.audio.currentTime;
      if (this.stop !== null && this.position >= this.stop) this.pause(this.stop);
      this.render();
      requestAnimationFrame(() => this.follow());
    }

    render() {
      this.slider.value = this.position;
      this.slider.setAttribute("aria-valuetext", `${this.position.toFixed(1)} of ${this.seconds.toFixed(1)} seconds`);
      this.output.textContent = `${clock(this.position)} / ${clock(this.seconds)}`;
      for (const {cursor} of this.tracks) cursor.style.setProperty("--at", clamp(this.position / this.seconds, 0, 1));
    }

    close() {
      if (this.isPlaying) this.pause();
      players.splice(players.indexOf(this), 1);
    }
  }

  /* Step 1: the recording. */

  let mixturePlayer = null;

  const takeMixture = async (file) => {
    show("#mixture-drop", false);
    show("#steps", false);
    show("#mixture-busy", true);
    const bar = $("#mixture-progress"), say = $("#mixture-state");
    say.textContent = `Uploading ${file.name}`;
    try {
      const recording = await send("/v1/recordings", formOf({recording: file}), (share) => {
        bar.value = share;
        if (share === 1) { bar.removeAttribute("value"); say.textContent = `Looking at ${file.name}`; }
      });
      const overview = await call("GET", `/v1/recordings/${recording.id}/overview`);
      await openMixture(recording, overview);
    } catch (error) {
      await dropMixture();
      throw error;
    } finally {
      show("#mixture-busy", false);
      bar.removeAttribute("value");
    }
  };

  const openMixture = async (recording, overview) => {
    state.recording = recording;
    $("#mixture-name").textContent = recording.name;
    const channels = {1: "mono", 2: "stereo"}[recording.channels] ?? `${recording.channels} channels`;
    $("#mixture-facts").textContent = `${clock(recording.seconds)} · ${recording.sample_rate / 1000} kHz · ${channels}`;
    show("#mixture", true);
    show("#voice-step", true);
    const options = ["mean", "each", ...Array.from({length: recording.channels}, (_, index) => `${index + 1}`)];
    const names = {mean: "their mean", each: "each by itself"};
    $("#channel").replaceChildren(...options.map((value) => new Option(names[value] ?? value, value)));
    $("#channel").closest("label").hidden = recording.channels === 1;
    for (const input of ["#begin", "#end"]) { $(input).max = recording.seconds.toFixed(2); $(input).value = ""; }
    $("#people").replaceChildren();
    $("#find-state").textContent = "";
    setRegion(null);
    mixturePlayer?.close();
    mixturePlayer = new Player($("#mixture-transport"), recording.seconds, [{source: `/v1/recordings/${recording.id}/audio`, cursor: $("#stage .cursor")}]);
    const canvas = $("#stage canvas");
    await paint(canvas, () => paintPicture(canvas, overview.pictures.mixture, overview.seconds, "--mixture"));
  };

  const dropMixture = async () => {
    if (state.recording) await call("DELETE", `/v1/recordings/${state.recording.id}`).catch(() => {});  // it may have expired
    state.recording = null;
    mixturePlayer?.close();
    mixturePlayer = null;
    for (const part of ["#mixture", "#voice-step", "#result", "#running"]) show(part, false);
    for (const part of ["#mixture-drop", "#steps"]) show(part, true);
  };

  /* The stretch: marked by pointer, by two handles, by numbers, or at the position of the player. */

  const setRegion = (region) => {
    const seconds = state.recording.seconds;
    state.region = region;
    show("#region", region !== null && kind() === "stretch");
    $("#region-play").disabled = region === null;
    if (region !== null) {
      $("#region").style.setProperty("--from", region[0] / seconds);
      $("#region").style.setProperty("--to", region[1] / seconds);
      [$("#begin").value, $("#end").value] = region.map((value) => value.toFixed(1));
      ["#region-begin", "#region-end"].forEach((handle, index) => {
        const element = $(handle);
        element.setAttribute("aria-valuemin", 0);
        element.setAttribute("aria-valuemax", seconds.toFixed(1));
        element.setAttribute("aria-valuenow", region[index].toFixed(1));
        element.setAttribute("aria-valuetext", `${region[index].toFixed(1)} seconds`);
      });
    }
    lookReady();
  };

  const moveEdge = (index, seconds) => {
    const other = (state.region ?? [0, state.recording.seconds])[1 - index];
    const value = clamp(Math.round(seconds * 100) / 100, 0, state.recording.seconds);
    setRegion(index === 0 ? [Math.min(value, other - 0.1), other] : [other, Math.max(value, other + 0.1)]);
  };

  const markRegions = () => {
    const stage = $("#stage");
    const secondsAt = (event) => {
      const box = stage.getBoundingClientRect();
      return clamp((event.clientX - box.left) / box.width, 0, 1) * state.recording.seconds;
    };
    let begin = null, edge = null, wasDragged = false;
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      edge = event.target.classList.contains("handle") ? +(event.target.id === "region-end") : null;
      [begin, wasDragged] = [event, false];
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      if (begin === null || (!wasDragged && Math.abs(event.clientX - begin.clientX) < 4)) return;
      wasDragged = true;
      if (edge !== null) { moveEdge(edge, secondsAt(event)); return; }
      const ends = [secondsAt(begin), secondsAt(event)].sort((a, b) => a - b);
      setRegion(ends[1] - ends[0] >= 0.1 ? ends : null);
      chooseKind("stretch");
    });
    stage.addEventListener("pointerup", (event) => {
      if (begin !== null && !wasDragged) mixturePlayer.seek(secondsAt(event));
      begin = null;
    });
    stage.addEventListener("pointercancel", () => { begin = null; });
    ["#region-begin", "#region-end"].forEach((handle, index) => $(handle).addEventListener("keydown", (event) => {
      const step = {ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1, PageDown: -1, PageUp: 1}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      moveEdge(index, state.region[index] + step);
    }));
    ["#begin", "#end"].forEach((input) => $(input).addEventListener("change", () => {
      const [from, to] = [$("#begin"), $("#end")].map((each) => each.valueAsNumber);
      const isRight = from >= 0 && to > from && from < state.recording.seconds;
      setRegion(isRight ? [from, Math.min(to, state.recording.seconds)] : null);
      if (!isRight) [$("#begin").valueAsNumber, $("#end").valueAsNumber] = [from, to];
    }));
    $("#begin-here").addEventListener("click", () => {
      const now = mixturePlayer.position, end = state.region?.[1] ?? state.recording.seconds;
      setRegion([now, end > now + 0.1 ? end : state.recording.seconds]);
    });
    $("#end-here").addEventListener("click", () => {
      const now = Math.max(mixturePlayer.position, 0.1), from = state.region?.[0] ?? 0;
      setRegion([from < now - 0.1 ? from : 0, now]);
    });
    when("#region-play", "click", () => { mixturePlayer.seek(state.region[0]); return mixturePlayer.play(state.region[1]); });
  };

  /* Step 2: whose voice. */

  const kind = () => $("input[name=kind]:checked").value;
  const picked = (name) => $(`input[name=${name}]:checked`)?.value ?? null;

  const chooseKind = (value) => {
    if (kind() !== value) $(`input[name=kind][value=${value}]`).checked = true;
    for (const pane of all(".pane")) pane.hidden = pane.dataset.kind !== value;
    show("#region", value === "stretch" && state.region !== null);
    lookReady();
    if (value === "voice") listVoices().catch(complain);
  };

  const missing = () => ({
    stretch: state.region === null ? "Mark a stretch of the recording first." :
      state.region[1] - state.region[0] < MIN_STRETCH ? "The stretch is too short; half a second is the least." : "",
    enrollment: state.enrollment === null ? "Choose or record a recording of the wanted person first." : "",
    person: picked("person") === null ? "Find the people, and choose one." : "",
    voice: picked("voice") === null ? "Choose a saved voice." : "",
  })[kind()];

  const lookReady = () => {
    $("#missing").textContent = missing();
    $("#extract").disabled = missing() !== "";
  };

  const takeEnrollment = async (file) => {
    state.enrollment = file;
    $("#enrollment-name").textContent = file.name;
    const audio = $("#enrollment-audio");
    if (audio.src) URL.revokeObjectURL(audio.src);
    audio.src = URL.createObjectURL(file);
    audio.hidden = false;
    audio.onerror = () => { audio.hidden = true; };  // the server may read formats that the browser cannot play
    lookReady();
  };

  const item = (name, value, label, ...more) => {
    const line = document.createElement("li"), choice = document.createElement("label"), radio = document.createElement("input");
    Object.assign(radio, {type: "radio", name, value});
    radio.addEventListener("change", lookReady);
    choice.append(radio, label);
    line.append(choice, ...more);
    return line;
  };

  const findPeople = async () => {
    $("#find").disabled = true;
    $("#find-state").textContent = "Listening to the recording…";
    try {
      const people = await call("GET", `/v1/recordings/${state.recording.id}/voices`);
      $("#find-state").textContent = people.length ? `${people.length === 1 ? "One person was" : `${people.length} people were`} found. Listen to know who is who.` : "No speech was found.";
      $("#people").replaceChildren(...people.map((person) => item(
        "person", person.number, `Person ${person.number}: speaks for ${person.seconds.toFixed(1)} s in ${person.turns.length} ${person.turns.length === 1 ? "turn" : "turns"}`,
        button("Listen", `Listen to person ${person.number}`, () => { mixturePlayer.seek(person.solo[0]); return mixturePlayer.play(person.solo[1]); }, "quiet"),
      )));
      lookReady();
    } catch (error) {
      $("#find-state").textContent = "";
      throw error;
    } finally { $("#find").disabled = false; }
  };

  const listVoices = async () => {
    const voices = await call("GET", "/v1/voices"), chosen = picked("voice");
    $("#voices-note").textContent = voices.length ? "Voices that were saved on this server. Delete those that are no longer needed." : "No voice is saved on this server. After an extraction, you can save its voice.";
    $("#voices").replaceChildren(...voices.map((voice) => {
      const about = voice.fits ? `saved on ${new Date(voice.created).toLocaleDateString()}` : "saved with another network, cannot be used";
      const line = item("voice", voice.id, `${voice.name} (${about})`, button("Delete", `Delete the voice ${voice.name}`, async () => {
        if (!confirm(`Delete the saved voice “${voice.name}”?`)) return;
        await call("DELETE", `/v1/voices/${voice.id}`);
        await listVoices();
      }, "quiet danger"));
      line.querySelector("input").disabled = !voice.fits;
      line.querySelector("input").checked = voice.id === chosen;
      return line;
    }));
    lookReady();
  };

  /* Step 3: the extraction. */

  const extract = async () => {
    if (missing()) return;
    await forget();
    const fields = {
      stretch: {begin: state.region?.[0].toFixed(3), end: state.region?.[1].toFixed(3)}, enrollment: {enrollment: state.enrollment},
      person: {person: picked("person")}, voice: {voice: picked("voice")},
    }[kind()];
    mixturePlayer?.isPlaying && mixturePlayer.pause();
    show("#result", false);
    show("#running", true);
    $("#extract").disabled = true;
    $("#progress").removeAttribute("value");
    $("#running-state").textContent = "Sending";
    $("#running").scrollIntoView({block: "nearest"});
    try {
      const form = formOf({recording: state.recording.id, ...fields, absent: $("#absent").value, channel: $("#channel").value || "mean"});
      follow(await send("/v1/extractions?wait=0", form, () => {}));
    } catch (error) { endRunning(); throw error; }
  };

  const endRunning = () => {
    state.events?.close();
    state.events = null;
    show("#running", false);
    lookReady();
  };

  const follow = (job) => {
    state.job = job;
    const events = state.events = new EventSource(`/v1/extractions/${job.id}/events`);
    events.addEventListener("state", async (event) => {
      const now = JSON.parse(event.data);
      showProgress(now);
      if (now.status === "done") { endRunning(); await openResult(now).catch(complain); }
      if (now.status === "failed") { endRunning(); complain(new Error(now.problem.detail)); }
    });
    events.addEventListener("deleted", endRunning);
    events.onerror = () => {
      if (events.readyState !== EventSource.CLOSED) return;
      endRunning();
      complain(new Error("The server no longer knows this extraction"));
    };
  };

  const showProgress = (job) => {
    const bar = $("#progress"), remaining = job.remaining_seconds;
    if (job.status === "queued") {
      $("#running-state").textContent = job.position === 1 ? "Next in the queue" : `Number ${job.position} in the queue`;
      bar.removeAttribute("value");
      return;
    }
    if (job.progress > 0) bar.value = job.progress; else bar.removeAttribute("value");
    const share = job.progress > 0 ? `${Math.floor(100 * job.progress)} %` : "Listening";
    $("#running-state").textContent = remaining === null || remaining < 1 ? share : `${share}, about ${remaining < 90 ? `${Math.ceil(remaining)} s` : `${Math.round(remaining / 60)} min`} left`;
  };

  const forget = async () => {
    const job = state.job;
    state.job = null;
    resultPlayer?.close();
    resultPlayer = null;
    if (job) await call("DELETE", `/v1/extractions/${job.id}`).catch(() => {});
  };

  let resultPlayer = null;
  const NAMES = {mixture: "Recording", voice: "The voice", residual: "The rest"};

  const trackOf = (name, picture, seconds, level, index) => {
    const track = document.createElement("div"), label = document.createElement("label"), radio = document.createElement("input");
    const text = document.createElement("span"), small = document.createElement("small"), stage = document.createElement("div");
    const canvas = document.createElement("canvas"), cursor = document.createElement("div");
    Object.assign(radio, {type: "radio", name: "track", value: name, checked: name === "voice"});
    small.textContent = `${level.toFixed(1).replace("-", "−")} dBFS`;
    text.append(NAMES[name], small);
    label.append(radio, text);
    [track.className, stage.className, cursor.className] = ["track", "stage", "cursor"];
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Waveform and spectrogram: ${NAMES[name]}`);
    stage.append(canvas, cursor);
    track.append(label, stage);
    const choose = () => {
      radio.checked = true;
      resultPlayer.choose(index);
      for (const other of all(".track")) other.classList.toggle("chosen", other === track);
    };
    radio.addEventListener("change", choose);
    stage.addEventListener("click", (event) => {
      const box = stage.getBoundingClientRect();
      if (!radio.checked) choose();
      resultPlayer.seek((event.clientX - box.left) / box.width * seconds);
    });
    return {track, canvas, cursor, draw: () => paintPicture(canvas, picture, seconds, `--${name}`)};
  };

  const presenceOf = (result, overview) => {
    const box = document.createElement("div"), canvas = document.createElement("canvas"), note = document.createElement("p");
    [box.className, note.className] = ["presence", "note"];
    canvas.setAttribute("role", "img");
    const total = result.presence.stretches.reduce((sum, [begin, end]) => sum + end - begin, 0);
    canvas.setAttribute("aria-label", `Where the voice is heard: ${result.presence.stretches.length} stretches, ${total.toFixed(1)} of ${result.seconds.toFixed(1)} seconds`);
    note.textContent = "How well the voice is heard over time; the bar marks where it is.";
    box.append(canvas);
    return {nodes: [box, note], canvas, draw: () => paintPresence(canvas, overview.presence_db, result.presence.stretches, result.seconds)};
  };

  const openResult = async (job) => {
    const {result} = job;
    const overview = await call("GET", `/v1/extractions/${job.id}/overview`);
    show("#result", true);
    const heard = result.presence;
    $("#verdict").textContent = heard === null ? "Done. The network of this server cannot tell where the voice is heard." : heard.is_present ? `The voice is ${heard.text}.` : `${heard.text[0].toUpperCase()}${heard.text.slice(1)}. Check the stretch or the recording of the person.`;
    $("#notes").replaceChildren(...result.notes.map((note) => Object.assign(document.createElement("li"), {textContent: note})));
    const names = Object.keys(overview.pictures);
    const tracks = names.map((name, index) => trackOf(name, overview.pictures[name], result.seconds, result.levels_db[name], index));
    $("#tracks").replaceChildren(...tracks.map(({track}) => track));
    resultPlayer = new Player($("#result-transport"), result.seconds, names.map((name, index) => ({source: result.files[`${name}.flac`], cursor: tracks[index].cursor})));
    resultPlayer.choose(names.indexOf("voice"));
    tracks[names.indexOf("voice")].track.classList.add("chosen");
    if (heard !== null && overview.presence_db !== null) {
      const strip = presenceOf(result, overview);
      tracks[names.indexOf("voice")].track.append(...strip.nodes);
      await paint(strip.canvas, strip.draw);
    }
    for (const {canvas, draw} of tracks) await paint(canvas, draw);
    fillDownloads(job);
    $("#check-up").textContent = result.check_up === null ? "A saved voice." : `Check-up: ${result.check_up.text}.`;
    $("#save-name").value = "";
    $("#expires").textContent = `Deleted at ${new Date(job.expires).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"})}, with the recording.`;
    $("#result-title").focus({preventScroll: true});
    $("#result").scrollIntoView({behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block: "start"});
  };

  const fillDownloads = (job) => {
    const stem = job.mixture.replace(/\.[^.]*$/, "");
    const row = (title, ...names) => {
      const line = document.createElement("tr"), head = document.createElement("th");
      head.textContent = title;
      head.scope = "row";
      line.append(head, ...names.filter((name) => job.result.files[name]).map((name) => {
        const cell = document.createElement("td"), link = document.createElement("a");
        Object.assign(link, {href: job.result.files[name], download: `${stem}-${name}`, textContent: name.split(".")[1].toUpperCase(), ariaLabel: `Download ${title.toLowerCase()} as ${name.split(".")[1].toUpperCase()}`});
        cell.append(link);
        return cell;
      }));
      return line;
    };
    const rows = ["voice", "residual"].map((name) => row(NAMES[name], ...["wav", "flac", "mp3"].map((kind) => `${name}.${kind}`)));
    if (job.result.files["voice.csv"]) rows.push(row("Timeline", "voice.csv", "voice.rttm", "voice.txt"));
    $("#downloads tbody").replaceChildren(...rows);
  };

  const saveVoice = async () => {
    const name = $("#save-name").value.trim();
    await call("POST", "/v1/voices", formOf({name, extraction: state.job.id}));
    $("#save-state").textContent = `Saved as “${name}”. You can use and delete it under “A saved voice”.`;
    if (kind() === "voice") await listVoices();
  };

  /* The start. */

  /* The hash of the address names the part, so that it can be kept as a bookmark. */
  const chooseMode = () => {
    const isLive = location.hash === "#live", isAllowed = state.server.is_allowed;
    $(`input[name=mode][value=${isLive ? "live" : "recording"}]`).checked = true;
    show("#work", isAllowed && !isLive);
    show("#live", isAllowed && isLive);
    if (isAllowed && isLive) openLive().catch(complain);
  };

  const start = async () => {
    const server = state.server = await call("GET", "/v1/server");
    show("#sign-in", server.needs_token && !server.is_allowed);
    show("#modes", server.is_allowed);
    $("#absent").closest("label").hidden = !server.tells_presence;
    startLive(server);
    chooseMode();
    const longest = server.max_seconds, minutes = Math.round(server.ttl_seconds / 60);
    const formats = server.has_ffmpeg ? "Any audio or video format" : "WAV, FLAC, MP3, Ogg or Opus";
    const kept = `${minutes} ${minutes === 1 ? "minute" : "minutes"}`;
    $("#limits").textContent = `${formats}, up to ${longest >= 5400 ? `${+(longest / 3600).toFixed(1)} hours` : longest >= 90 ? `${Math.round(longest / 60)} minutes` : `${longest} seconds`} and ${Math.round(server.max_bytes / 1e6)} MB.`;
    $("#privacy").textContent = `Recordings go to this server and nowhere else. They and the results are deleted when you say so, after ${kept} at the latest, and when the server ends. Voices are saved only when you ask. onevoice ${server.version}`;
    if (server.needs_token && !server.is_allowed) $("#token").focus();
    lookReady();
  };

  when("#sign-in", "submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("/v1/session", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({token: $("#token").value})});
    if (!answer.ok) throw problemOf(await answer.text(), answer.status);
    $("#token").value = "";
    await start();
  });
  takeFiles("#mixture-drop", "#mixture-file", takeMixture);
  takeFiles("#enrollment-drop", "#enrollment-file", takeEnrollment);
  recordTo("#mixture-record", takeMixture);
  recordTo("#enrollment-record", takeEnrollment);
  when("#sample", "click", async () => {
    const fetched = async (name) => new File([await (await fetch(`/v1/samples/${name}`)).blob()], name, {type: "audio/flac"});
    await takeMixture(await fetched("mixture.flac"));
    await takeEnrollment(await fetched("enrollment.flac"));
    chooseKind("enrollment");
  });
  when("#mixture-change", "click", async () => { await forget(); await dropMixture(); });
  for (const radio of all("input[name=kind]")) radio.addEventListener("change", () => chooseKind(radio.value));
  for (const radio of all("input[name=mode]")) radio.addEventListener("change", () => { location.hash = radio.value === "live" ? "live" : ""; });
  addEventListener("hashchange", chooseMode);
  markRegions();
  when("#find", "click", findPeople);
  when("#extract", "click", extract);
  when("#cancel", "click", async () => { await forget(); endRunning(); });
  when("#save", "submit", async (event) => { event.preventDefault(); await saveVoice(); });
  when("#again", "click", () => { $("#voice-step").scrollIntoView(); $("input[name=kind]:checked").focus(); });
  when("#forget", "click", async () => { await forget(); await dropMixture(); $("#mixture-file").focus(); });
  for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.preventDefault());
  start().catch(complain);
}
