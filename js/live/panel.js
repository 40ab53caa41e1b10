// What a node shows of its run: the video, the strip of blocks, the line of figures, what went wrong.

import { clock, figuresOf, isOver, madeSeconds, short } from "./figures.js";
import { Player } from "./player.js";
import { Strip, lengthOf } from "./strip.js";
import { icon, styleElement } from "./style.js";

const MOST_OLD_RUNS = 50;

/**
 * words: see words.js. streamUrl(sid), fileUrl(file): addresses. settings: {autoplay(), sound(), strip()}.
 * retake({start, end}): makes the Retake node; returns {isNew}, or null where there is none to make.
 * forwardWheel(event): for the canvas of the host, which zooms.
 */
export class Panel {
  constructor({ words, streamUrl, fileUrl, settings, retake, forwardWheel }) {
    this.words = words;
    this.streamUrl = streamUrl;
    this.fileUrl = fileUrl;
    this.settings = settings;
    this.retake = retake;
    this.detail = null;
    this.span = null;
    this.notice = "";
    this.oldRuns = [];
    this.#build();
    this.element.addEventListener("wheel", forwardWheel, { passive: false });
    // Collapsing a node may take the element off the page, which pauses the video: go on when it is back.
    this.sight = new IntersectionObserver((entries) => {
      this.isSeen = entries.at(-1).isIntersecting;
      if (this.isSeen) this.player.start();
      this.#refreshSoon();
    });
    this.sight.observe(this.element);
    this.#refresh();
  }

  /** Takes a `joyavatar.progress` detail; those of runs that a later one has replaced are left out. */
  show(detail) {
    if (!detail?.sid || this.oldRuns.includes(detail.sid)) return;
    if (this.detail && this.detail.sid !== detail.sid) {
      this.oldRuns = [...this.oldRuns, this.detail.sid].slice(-MOST_OLD_RUNS);
      this.#newRun();
    } else if (this.detail && isOver(this.detail) && !isOver(detail)) {
      return;
    }
    // A list of sessions that was asked for earlier may arrive later: the further one is true.
    if (this.detail?.sid === detail.sid && !isOver(detail) && detail.blocks < this.detail.blocks) return;
    this.detail = detail;
    if (detail.file) this.player.showFile(this.fileUrl(detail.file));
    else if (detail.part) this.player.showStream(this.streamUrl(detail.sid));
    this.#refreshSoon();
  }

  /** Shows a finished file of which nothing else is known. */
  showFile(file) {
    if (!this.detail) this.player.showFile(this.fileUrl(file));
  }

  get isIdle() {
    return this.detail === null;
  }

  /** A setting was changed. */
  update() {
    this.#refreshSoon();
  }

  release() {
    this.isReleased = true;
    this.sight.disconnect();
    this.strip.release();
    this.player.release();
  }

  #newRun() {
    this.notice = "";
    this.player.rewind();
    this.strip.clearSpan();
  }

  #build() {
    const { words } = this;
    this.element = make("div", "joyavatar-live");
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", words("group"));
    this.#buildStage();
    this.strip = new Strip({
      words,
      canSpan: () => this.#canRetake(),
      onSeek: (seconds) => this.player.seek(seconds),
      onSpan: (span) => {
        this.span = span;
        this.notice = "";
        this.#refreshSoon();
      },
    });
    this.figures = make("dl", "joyavatar-figures");
    this.#buildFoot();
    this.element.append(styleElement(), this.stage, this.strip.element, this.figures, this.foot);
    // Keys that are meant for a button must not reach the host's shortcuts.
    this.element.addEventListener("keydown", (event) => {
      if ([" ", "Enter"].includes(event.key)) event.stopPropagation();
    });
  }

  #buildStage() {
    const { words } = this;
    this.stage = make("div", "joyavatar-stage");
    this.empty = make("div", "joyavatar-empty");
    this.emptyText = make("span", "", words("empty"));
    this.empty.append(icon("film"), this.emptyText);
    this.badge = make("div", "joyavatar-badge");
    this.badge.setAttribute("role", "status");
    this.bar = make("div", "joyavatar-bar");
    this.time = make("span", "joyavatar-time");
    this.smallPlay = this.#button("", words("play"), () => this.player.toggle());
    this.fullscreen = this.#button("", words("fullscreen"), () => this.player.fullscreen(), icon("fullscreen"));
    this.bar.append(this.smallPlay, this.time, this.fullscreen);
    this.play = this.#button("joyavatar-play", words("play"), () => this.player.toggle(), icon("play"));
    this.sound = this.#button("joyavatar-sound", words("soundOn"), () => this.player.toggleSound());
    this.stage.append(this.empty, this.bar, this.play, this.badge, this.sound);
    this.player = new Player({
      stage: this.stage,
      label: words("video"),
      autoplay: () => this.settings.autoplay(),
      sound: () => this.settings.sound(),
      mayRetry: () => this.detail !== null && !isOver(this.detail) && this.detail.part,
      onChange: () => this.#refreshSoon(),
    });
    this.stage.addEventListener("click", (event) => {
      if (event.target instanceof HTMLVideoElement) this.player.toggle();
    });
  }

  #buildFoot() {
    const { words } = this;
    this.foot = make("div", "joyavatar-foot");
    this.note = make("span", "joyavatar-note");
    this.note.setAttribute("role", "status");
    this.retakeButton = this.#button("joyavatar-retake", "", () => this.#makeRetake());
    this.clearButton = this.#button("joyavatar-clear", words("clear"), () => this.strip.clearSpan(), icon("close"));
    this.foot.append(this.note, this.retakeButton, this.clearButton);
  }

  #button(name, label, onClick, ...inside) {
    const button = make("button", name);
    button.type = "button";
    if (label) describe(button, label);
    button.append(...inside);
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      onClick();
    });
    return button;
  }

  #canRetake() {
    return this.detail !== null && isOver(this.detail) && this.detail.retake === true && madeSeconds(this.detail) > 0;
  }

  #makeRetake() {
    const { start, end } = this.span;
    const made = this.retake({ start: round(start), end: round(end) });
    this.strip.clearSpan();
    if (made) this.notice = this.words(made.isNew ? "retakeMade" : "retakeSet", short(start), short(end));
    else this.notice = this.words("retakeMissing");
    this.#refreshSoon();
  }

  /** Draws at the next frame of the screen; while the video plays, at about every fourth one, for the playhead. */
  #refreshSoon() {
    if (this.isDue || this.isReleased) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      if (this.isReleased) return;
      this.#refresh();
      if (this.isSeen && this.player.isPlaying) setTimeout(() => this.#refreshSoon(), 60);
    });
  }

  #refresh() {
    this.#refreshStage();
    this.strip.element.hidden = this.detail === null || !this.settings.strip();
    this.strip.show(this.detail, this.player.time);
    this.#refreshFigures();
    this.#refreshFoot();
  }

  #refreshStage() {
    const { player, words, detail } = this;
    const isThere = player.hasPicture;
    this.stage.classList.toggle("joyavatar-bare", !isThere);
    this.empty.hidden = isThere;
    setText(this.emptyText, words(player.hasFailed ? "noPlay" : "empty"));
    const canPlay = isThere || (player.loaded !== null && !player.wantsPlay);
    this.sound.hidden = !isThere;
    this.bar.hidden = !isThere;
    this.play.hidden = !canPlay || player.isPlaying;
    this.#refreshSound();
    this.#swapIcon(this.smallPlay, player.isPlaying ? "pause" : "play", words(player.isPlaying ? "pause" : "play"));
    const length = detail && !isOver(detail) ? lengthOf(detail) : player.video.duration;
    setText(this.time, Number.isFinite(length) ? `${clock(player.time)} / ${clock(length)}` : clock(player.time));
    this.#refreshBadge(isThere);
  }

  #refreshSound() {
    const { isMuted } = this.player;
    const word = this.words(isMuted ? "soundOn" : "soundOff");
    if (!this.#swapIcon(this.sound, isMuted ? "soundOff" : "soundOn", word)) return;
    this.sound.dataset.muted = String(isMuted);
    if (isMuted) this.sound.append(make("span", "", word));
  }

  /** Gives a button another icon and label; false where it has them already. */
  #swapIcon(button, name, label) {
    if (button.dataset.icon === name) return false;
    button.dataset.icon = name;
    button.replaceChildren(icon(name));
    describe(button, label);
    return true;
  }

  #refreshBadge(isThere) {
    const { detail, player, words } = this;
    this.badge.hidden = detail === null;
    if (!detail) return;
    let [state, word] = [detail.state, detail.state];
    if (!isOver(detail)) {
      const isShort = isThere && player.isWaiting && player.wantsPlay;
      [state, word] = isShort ? ["wait", "waiting"] : ["live", detail.frames > 0 ? "live" : "starting"];
    }
    this.badge.dataset.state = state;
    setText(this.badge, words(word));
  }

  #refreshFigures() {
    const figures = this.detail ? figuresOf(this.detail, this.words) : [];
    this.figures.hidden = figures.length === 0;
    while (this.figures.children.length < figures.length) {
      const figure = make("div", "joyavatar-figure");
      figure.append(make("dt", ""), make("dd", ""));
      this.figures.append(figure);
    }
    figures.forEach(({ label, text, tone }, index) => {
      const figure = this.figures.children[index];
      setText(figure.firstChild, label);
      setText(figure.lastChild, text);
      figure.title = `${label}: ${text}`;
      figure.dataset.tone = tone ?? "";
    });
  }

  #refreshFoot() {
    const { words, span } = this;
    const [text, tone] = this.#message();
    setText(this.note, text);
    this.note.dataset.tone = tone;
    this.retakeButton.hidden = !span;
    this.clearButton.hidden = !span;
    if (span) setText(this.retakeButton, words("retake", short(span.start), short(span.end)));
    this.foot.hidden = !span && !text;
  }

  #message() {
    const { detail, words } = this;
    if (this.notice) return [this.notice, ""];
    if (detail?.state === "failed") return [words("failedWhy", detail.message || words("failedUnknown")), "bad"];
    if (this.span) return ["", ""];
    if (detail?.state === "cancelled") {
      return [detail.file ? words("keptAs", nameOf(detail.file)) : detail.message || words("cancelledEmpty"), ""];
    }
    return [this.#canRetake() && this.settings.strip() ? words("hint") : "", ""];
  }
}

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

function describe(button, label) {
  button.title = label;
  button.setAttribute("aria-label", label);
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function nameOf(file) {
  return file.subfolder ? `${file.subfolder}/${file.filename}` : file.filename;
}

function round(seconds) {
  return Math.round(seconds * 10000) / 10000;
}
