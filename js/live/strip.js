// The strip under the video: blocks that are made, in the window and to come; playhead; choice of a span.

import { isOver, madeSeconds, short } from "./figures.js";

const SMALLEST_CELL = 5;
const GAP = 1;
const CLICK_PIXELS = 4;

/** Seconds at which block `index` begins: the first block is shorter than the others. */
export function edgeOf(detail, index) {
  if (index <= 0) return 0;
  return detail.first_block_seconds + (index - 1) * detail.block_seconds;
}

/** Blocks of the whole video; while its length is not known: those made and those in the window. */
export function blocksOf(detail) {
  const known = detail.blocks_total ?? detail.blocks + (isOver(detail) ? 0 : detail.window);
  return Math.max(1, known, detail.blocks);
}

/** Seconds from the left to the right end of the strip. */
export function lengthOf(detail) {
  return detail.total_seconds || (isOver(detail) && madeSeconds(detail)) || edgeOf(detail, blocksOf(detail));
}

/** The block that is shown at `seconds`. */
export function blockAt(detail, seconds) {
  const index = seconds < detail.first_block_seconds ? 0 : 1 + Math.floor((seconds - detail.first_block_seconds) / detail.block_seconds + 1e-6);
  return Math.min(Math.max(0, index), blocksOf(detail) - 1);
}

/** From the beginning of the block at `from` to the end of the block at `to`, in either order, within what was made. */
export function spanOf(detail, from, to) {
  const end = Math.min(lengthOf(detail), madeSeconds(detail));
  const first = blockAt(detail, Math.min(from, to, end - 1e-3));
  const last = blockAt(detail, Math.min(Math.max(from, to), end - 1e-3));
  return { start: edgeOf(detail, first), end: Math.min(edgeOf(detail, last + 1), end) };
}

export class Strip {
  /** onSeek(seconds), onSpan({start, end} or null). canSpan(): whether a span may be chosen now. */
  constructor({ words, canSpan, onSeek, onSpan }) {
    this.words = words;
    this.canSpan = canSpan;
    this.onSeek = onSeek;
    this.onSpan = onSpan;
    this.detail = null;
    this.time = 0;
    this.span = null;
    this.hover = null;
    this.element = document.createElement("div");
    this.element.className = "joyavatar-strip";
    this.canvas = document.createElement("canvas");
    this.canvas.className = "joyavatar-blocks";
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "slider");
    this.canvas.setAttribute("aria-label", words("strip"));
    this.tip = document.createElement("div");
    this.tip.className = "joyavatar-tip";
    this.tip.hidden = true;
    this.element.append(this.canvas, this.tip);
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.canvas);
    this.#listen();
  }

  show(detail, time) {
    this.detail = detail;
    this.time = time;
    this.draw();
  }

  clearSpan() {
    if (!this.span) return;
    this.span = null;
    this.onSpan(null);
    this.draw();
  }

  release() {
    this.sizes.disconnect();
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", () => (this.from = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #secondsAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return share * lengthOf(this.detail);
  }

  #move(event) {
    if (!this.detail) return;
    const seconds = this.#secondsAt(event);
    this.hover = seconds;
    if (this.from && this.canSpan() && Math.abs(event.clientX - this.from.x) >= CLICK_PIXELS) this.from.isDrag = true;
    if (this.from?.isDrag) this.#choose(this.from.seconds, seconds);
    this.#showTip(seconds);
    this.draw();
  }

  #leave() {
    this.hover = null;
    this.tip.hidden = true;
    this.draw();
  }

  #down(event) {
    if (!this.detail || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.from = { x: event.clientX, seconds: this.#secondsAt(event), isDrag: false };
  }

  #up(event) {
    const from = this.from;
    this.from = null;
    if (!from || !this.detail || from.isDrag) return;
    this.onSeek(this.#secondsAt(event));
    if (this.canSpan()) this.#choose(from.seconds, from.seconds);
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!this.detail) return;
    if (event.key === "Escape") this.clearSpan();
    else if (step && event.shiftKey && this.canSpan()) this.#widen(step);
    else if (step) this.onSeek(this.#clamp(this.time + step * this.detail.block_seconds));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #widen(step) {
    const start = this.span?.start ?? this.time;
    const end = this.span ? this.span.end - 1e-3 + step * this.detail.block_seconds : this.time;
    this.#choose(start, Math.max(start, this.#clamp(end)));
  }

  #clamp(seconds) {
    return Math.min(lengthOf(this.detail), Math.max(0, seconds));
  }

  #choose(from, to) {
    this.span = spanOf(this.detail, from, to);
    this.onSpan(this.span);
    this.draw();
  }

  #showTip(seconds) {
    const { words, detail } = this;
    const index = blockAt(detail, seconds);
    const state = index < detail.blocks ? "made" : !isOver(detail) && index < detail.blocks + detail.window ? "making" : "toCome";
    const end = Math.min(edgeOf(detail, index + 1), lengthOf(detail));
    const ends = words("span", edgeOf(detail, index).toFixed(1), end.toFixed(1));
    this.tip.textContent = `${words("block", index + 1)} · ${ends} · ${words(state)}`;
    this.tip.hidden = false;
    const half = this.tip.offsetWidth / 2;
    const width = this.element.clientWidth;
    const middle = (seconds / lengthOf(detail)) * width;
    this.tip.style.left = `${Math.min(width - half, Math.max(half, middle))}px`;
  }

  draw() {
    const { canvas, detail } = this;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width || !height) return;
    // Twice the pixels of the screen, because the canvas of the host may be zoomed in.
    const scale = 2 * (globalThis.devicePixelRatio || 1);
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== wide) canvas.width = wide;
    if (canvas.height !== high) canvas.height = high;
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--joyavatar-${name}`).trim() || "#888";
    this.#drawBlocks(pen, width, height, colour);
    if (detail) this.#drawMarks(pen, width, height, colour);
    this.#describe();
  }

  #drawBlocks(pen, width, height, colour) {
    const { detail } = this;
    pen.save();
    pen.beginPath();
    for (const [left, right] of this.#cells(width)) {
      pen.roundRect(left, 4, Math.max(1, right - left - GAP), height - 8, Math.min(2, (right - left) / 3));
    }
    pen.clip();
    pen.fillStyle = colour("to-come");
    pen.fillRect(0, 0, width, height);
    if (detail) {
      const at = (index) => (Math.min(edgeOf(detail, index), lengthOf(detail)) / lengthOf(detail)) * width;
      const made = detail.blocks >= blocksOf(detail) ? width : at(detail.blocks);
      if (!isOver(detail)) {
        pen.fillStyle = colour("window");
        pen.fillRect(made, 0, at(detail.blocks + detail.window) - made, height);
      }
      pen.fillStyle = colour("done");
      pen.fillRect(0, 0, made, height);
    }
    pen.restore();
  }

  /** Left and right ends of the cells that are drawn: one for each block, or for a group of them where they are many. */
  #cells(width) {
    const { detail } = this;
    if (!detail) return [[0, width + GAP]];
    const blocks = blocksOf(detail);
    const most = Math.max(1, Math.floor(width / SMALLEST_CELL));
    // As many blocks in every group: uneven cells would look like gaps.
    const group = Math.ceil(blocks / most);
    const count = Math.ceil(blocks / group);
    const length = lengthOf(detail);
    const at = (cell) => {
      if (cell === count) return width + GAP;
      return (Math.min(edgeOf(detail, cell * group), length) / length) * width;
    };
    return Array.from({ length: count }, (_, cell) => [at(cell), at(cell + 1)]).filter(([left, right]) => right - left > 0.5);
  }

  #drawMarks(pen, width, height, colour) {
    const length = lengthOf(this.detail);
    const at = (seconds) => Math.min(width, Math.max(0, (seconds / length) * width));
    if (this.span) {
      const [left, right] = [at(this.span.start), at(this.span.end)];
      pen.globalAlpha = 0.4;
      pen.fillStyle = "#fff";
      pen.fillRect(left, 1, right - left, height - 2);
      pen.globalAlpha = 1;
      pen.strokeStyle = colour("span");
      pen.lineWidth = 2;
      pen.strokeRect(left + 1, 2, Math.max(2, right - left - 2), height - 4);
    }
    if (this.hover !== null) {
      pen.globalAlpha = 0.5;
      pen.fillStyle = colour("head");
      pen.fillRect(Math.min(width - 1, at(this.hover)), 2, 1, height - 4);
      pen.globalAlpha = 1;
    }
    pen.fillStyle = colour("head");
    pen.beginPath();
    pen.roundRect(Math.min(width - 2.5, Math.max(0, at(this.time) - 1.25)), 0, 2.5, height, 1.25);
    pen.fill();
  }

  #describe() {
    const { canvas, detail } = this;
    const length = detail ? lengthOf(detail) : 0;
    canvas.setAttribute("aria-valuemin", "0");
    canvas.setAttribute("aria-valuemax", short(length));
    canvas.setAttribute("aria-valuenow", short(Math.min(this.time, length)));
    canvas.setAttribute("aria-valuetext", this.words("seconds", this.time.toFixed(1)));
  }
}
