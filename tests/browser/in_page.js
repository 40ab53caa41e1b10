// Put into the page before its own scripts: nodes by hand, and what a panel of the live preview shows.

window.trial = {
  nodes(graph = window.app.graph) {
    return [...(graph.nodes ?? graph._nodes)];
  },

  /** The nodes of a type in the graph on the screen, subgraphs left out. */
  all(type) {
    return this.nodes(window.app.canvas.graph).filter((node) => node.type === type);
  },

  add(type, pos, values = {}) {
    const node = window.LiteGraph.createNode(type);
    node.pos = pos;
    window.app.graph.add(node);
    for (const [name, value] of Object.entries(values)) this.set(node, name, value);
    return node;
  },

  set(node, name, value) {
    const widget = node.widgets.find((candidate) => candidate.name === name);
    widget.value = value;
    widget.callback?.(value, window.app.canvas, node);
  },

  /** What its widgets hold, for another node of its kind. */
  values(node) {
    const kept = (node.widgets ?? []).filter((widget) => widget.name !== "joyavatar_live" && widget.type !== "button");
    return Object.fromEntries(kept.map((widget) => [widget.name, widget.value]));
  },

  join(from, to, output, input = output) {
    from.connect(from.findOutputSlot(output), to, to.findInputSlot(input));
  },

  /** Loads a workflow with one chain, with another sound if one is given, and other values of widgets, wherever these are. */
  async load(graph, name, sound, values) {
    await window.app.loadGraphData(graph, true, true, name);
    if (sound) this.hear(this.all("JoyAvatarAudioEncoder")[0], sound);
    for (const node of this.nodes()) {
      for (const widget of node.widgets ?? []) if (widget.name in values) this.set(node, widget.name, values[widget.name]);
    }
    this.show(...this.all("JoyAvatarStreamToVideo"));
  },

  /** Load Audio in place of the voice that `encoder` hears. */
  hear(encoder, file) {
    this.join(this.add("LoadAudio", [60, encoder.pos[1] + 500], { audio: file }), encoder, "AUDIO", "audio");
  },

  /** From a second picture and voice to a second video, below the first chain and with its model. */
  secondChain(picture, file) {
    const below = (node) => [node.pos[0], node.pos[1] + 900];
    const [first] = this.all("JoyAvatarSample");
    const sample = this.add("JoyAvatarSample", below(first), { picture });
    const made = {};
    for (const kind of ["Reference", "AudioEncoder", "StreamingSampler", "StreamDecode", "StreamToVideo"]) {
      const [like] = this.all(`JoyAvatar${kind}`);
      made[kind] = this.add(like.type, below(like), this.values(like));
    }
    this.join(sample, made.Reference, "image");
    this.hear(made.AudioEncoder, file);
    this.join(this.all("JoyAvatarLoadModel")[0], made.StreamingSampler, "model");
    this.join(made.Reference, made.StreamingSampler, "reference");
    this.join(made.AudioEncoder, made.StreamingSampler, "voice");
    this.join(made.StreamingSampler, made.StreamDecode, "latents");
    this.join(made.StreamDecode, made.StreamToVideo, "frames");
    return String(made.StreamToVideo.id);
  },

  /** What the preview of a node shows; null where it has none. */
  look(node) {
    const panel = node?.widgets?.find((widget) => widget.name === "joyavatar_live")?.element;
    const video = panel?.querySelector("video:not(.joyavatar-behind)");
    if (!video) return null;
    const source = video.getAttribute("src") ?? "";
    return {
      node: String(node.id),
      sid: source.match(/stream\/([0-9a-f]{32})/)?.[1] ?? null,
      file: new URLSearchParams(source.split("?")[1] ?? "").get("filename"),
      time: video.currentTime,
      length: Number.isFinite(video.duration) ? video.duration : null,
      paused: video.paused,
      ended: video.ended,
      videos: panel.querySelectorAll("video").length,
      wide: panel.getBoundingClientRect().width,
      badge: panel.querySelector(".joyavatar-badge").textContent,
      note: panel.querySelector(".joyavatar-note").textContent,
      hint: panel.querySelector(".joyavatar-empty").hidden ? "" : panel.querySelector(".joyavatar-empty").textContent,
    };
  },

  looks(type = "JoyAvatarStreamToVideo") {
    return this.all(type).map((node) => this.look(node));
  },

  /** Fits these nodes on the screen. */
  show(...nodes) {
    const [left, top] = [0, 1].map((i) => Math.min(...nodes.map((node) => node.pos[i])));
    const [right, bottom] = [0, 1].map((i) => Math.max(...nodes.map((node) => node.pos[i] + node.size[i])));
    const { ds } = window.app.canvas;
    ds.scale = Math.min(1, 1400 / (right - left), 760 / (bottom - top));
    ds.offset = [300 / ds.scale - left, 140 / ds.scale - top];
    window.app.canvas.setDirty(true, true);
  },

  /** From now on: samples, events and long tasks, as the head of live.mjs says. */
  record() {
    const began = performance.now();
    const since = (moment) => Math.round(moment - began) / 1000;
    const source = (video) => (/stream\/[0-9a-f]{32}/.test(video.src) ? "stream" : video.src && "file");
    const told = (this.recorded = { samples: [], events: [], tasks: [] });
    let run = null;
    window.app.api.addEventListener("joyavatar.progress", ({ detail }) => (run = detail));
    const see = () => {
      const video = document.querySelector(".joyavatar-live video:not(.joyavatar-behind)");
      if (!video) return;
      const { currentTime: time, readyState: ready, buffered, ended, paused } = video;
      const length = buffered.length ? buffered.end(buffered.length - 1) : 0;
      const { frames = 0, blocks = 0, state = "" } = run ?? {};
      told.samples.push({ at: since(performance.now()), time, length, ready, source: source(video), ended, paused, frames, blocks, state });
    };
    setInterval(see, 100);
    const note = ({ type: name, target }) => {
      if (target instanceof HTMLVideoElement) {
        const { currentTime: time, error } = target;
        told.events.push({ at: since(performance.now()), name, source: source(target), time, error: error?.message });
      }
    };
    for (const name of ["waiting", "stalled", "playing", "pause", "seeked", "ended", "error", "loadstart", "emptied"]) {
      document.addEventListener(name, note, true); // these do not bubble
    }
    new PerformanceObserver((list) => {
      for (const task of list.getEntries()) told.tasks.push({ at: since(task.startTime), seconds: task.duration / 1000 });
    }).observe({ entryTypes: ["longtask"] });
  },

  async sessions() {
    return (await fetch("/joyavatar/sessions")).json();
  },
};
