"use strict";
{
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colors = 6;

  /* Charts: drawn again when their width or the color scheme changes. */

  const seriesOf = (kind, names) => names.map((label, number) => {
    const color = css(`--series-${(number % colors) + 1}`);
    const common = {label, stroke: color, value: (_, value) => (value == null ? "–" : String(+value.toPrecision(5)))};
    if (kind === "bars") {
      return {...common, fill: `color-mix(in srgb, ${color} 45%, transparent)`, points: {show: false},
              paths: uPlot.paths.bars({size: [1, Infinity], align: 1, gap: 1})};
    }
    if (kind === "points") return {...common, paths: () => null, points: {show: true, size: 5, fill: color}};
    return {...common, width: 1.75, spanGaps: true, points: {size: 5, fill: color, show: (chart, index) =>
      chart.data[index].filter((value) => value != null).length < 40}};
  });

  const optionsOf = (spec, width) => {
    const line = {stroke: css("--line"), width: 1};
    const axis = (label, size) => ({stroke: css("--soft"), grid: line, ticks: line, font: "12px system-ui, sans-serif",
                                    ...(label && {label, labelFont: "12px system-ui, sans-serif", labelSize: 18}), size,
                                    values: (_, values) => values.map((value) => String(+value.toPrecision(5)))});
    const x = {time: false, ...(spec.span && {range: spec.span})};
    const label = spec.x_label || "value";
    return {
      width, height: 260, scales: {x}, padding: [8, 12, 0, 0],
      axes: [{...axis(spec.x_label, 30), space: 60}, axis(spec.y_label, 56)],
      series: [{label, value: (_, value) => (value == null ? "–" : String(+value.toPrecision(6)))},
               ...seriesOf(spec.kind, spec.names)],
    };
  };

  const drawCharts = () => {
    for (const figure of document.querySelectorAll(".chart")) {
      const plot = figure.querySelector(".plot");
      const spec = JSON.parse(figure.querySelector("script").textContent);
      plot.replaceChildren();
      if (spec.data[0].length === 0) plot.textContent = "no values";
      else figure.chart = new uPlot(optionsOf(spec, plot.clientWidth), spec.data, plot);
    }
  };

  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  const resizing = new ResizeObserver((entries) => {
    for (const {target} of entries) target.parentElement.chart?.setSize({width: target.clientWidth, height: 260});
  });
  document.querySelectorAll(".plot").forEach((plot) => resizing.observe(plot));

  /* Players: of all sounds of a page one plays; aligned tracks of a group share their position. */

  const groups = [];
  const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

  class Group {
    constructor(element) {
      const find = (selector) => element.querySelector(selector);
      [this.button, this.slider, this.output] = [find(".play"), find(".position"), find(".clock")];
      this.tracks = [...element.querySelectorAll(".track")].map((track, number) => ({
        track, number, radio: track.querySelector("input"), audio: track.querySelector("audio"),
        cursor: track.querySelector(".cursor"), seconds: +track.dataset.seconds,
        timeline: track.dataset.aligned === "yes" ? "shared" : String(number),
      }));
      this.positions = {};
      this.current = this.tracks[0];
      find(".transport").hidden = false;
      for (const each of this.tracks) {
        each.audio.controls = false;
        each.audio.hidden = true;
        each.radio.checked = each === this.current;
        each.radio.addEventListener("change", () => this.choose(each));
        each.audio.addEventListener("ended", () => { this.positions[each.timeline] = 0; this.pause(0); });
        each.track.querySelector(".pictures").addEventListener("click", (event) => this.point(each, event));
      }
      this.button.addEventListener("click", () => (this.isPlaying ? this.pause() : this.play()));
      this.slider.addEventListener("input", () => this.seek(+this.slider.value));
      this.show();
    }

    get position() { return Math.min(this.positions[this.current.timeline] ?? 0, this.current.seconds); }

    get isPlaying() { return this.button.classList.contains("playing"); }

    /* Audio is decoded when a group is first used, so that a page with many groups opens at once. */
    load() {
      if (this.isLoaded) return;
      this.isLoaded = true;
      for (const {audio} of this.tracks) { audio.preload = "auto"; audio.load(); }
    }

    choose(track) {
      const wasPlaying = this.isPlaying;
      if (wasPlaying) this.pause();
      this.current = track;
      track.radio.checked = true;
      this.show();
      if (wasPlaying) this.play();
    }

    play() {
      for (const group of groups) if (group !== this && group.isPlaying) group.pause();
      this.load();
      const {audio, seconds} = this.current;
      audio.currentTime = this.position >= seconds - 0.05 ? 0 : this.position;
      this.button.classList.add("playing");
      this.button.setAttribute("aria-label", "Pause");
      audio.play().catch(() => this.pause());
      requestAnimationFrame(() => this.follow());
    }

    pause(position = this.current.audio.currentTime) {
      this.positions[this.current.timeline] = position;
      this.current.audio.pause();
      this.button.classList.remove("playing");
      this.button.setAttribute("aria-label", "Play");
      this.show();
    }

    seek(seconds) {
      this.load();
      this.positions[this.current.timeline] = seconds;
      this.current.audio.currentTime = seconds;
      this.show();
    }

    point(track, event) {
      const picture = event.target.closest("svg, img");
      if (!picture) return;
      if (track !== this.current) this.choose(track);
      const box = picture.getBoundingClientRect();
      this.seek(((event.clientX - box.left) / box.width) * track.seconds);
    }

    follow() {
      if (!this.isPlaying) return;
      this.positions[this.current.timeline] = this.current.audio.currentTime;
      this.show();
      requestAnimationFrame(() => this.follow());
    }

    show() {
      const {seconds} = this.current;
      this.slider.max = seconds;
      this.slider.value = this.position;
      this.slider.setAttribute("aria-valuetext", `${this.position.toFixed(1)} of ${seconds.toFixed(1)} seconds`);
      this.output.textContent = `${clock(this.position)} / ${clock(seconds)}`;
      for (const each of this.tracks) {
        each.track.classList.toggle("chosen", each === this.current);
        const isShown = each.timeline === this.current.timeline;
        each.cursor.hidden = !isShown;
        if (isShown) each.cursor.style.setProperty("--at", Math.min(1, this.position / each.seconds));
      }
    }
  }

  for (const element of document.querySelectorAll(".players")) groups.push(new Group(element));
}
