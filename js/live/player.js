// A video that plays while its file grows, and changes over to the finished file without a flash.

const RETRIES = 5;
const CHANGE_OVER_LIMIT_MS = 10000;
const LEAD_SECONDS = 0.25;
const MEET_LIMIT_MS = 5000;
const SEEKS = 3;
const AT_END_SECONDS = 0.15;

/**
 * stage: the element that holds the <video>. onChange: called when anything that is shown may have changed.
 * mayRetry: whether the run that feeds the stream goes on, so that a lost connection is worth another try.
 * autoplay, sound: what the settings say when a run begins; the user's own choice in this player goes before them.
 *
 * Nothing is loaded before `start()`: a node that nobody sees (inside a closed subgraph) costs no connection.
 */
export class Player {
  constructor({ stage, label, autoplay, sound, mayRetry, onChange }) {
    this.stage = stage;
    this.label = label;
    this.mayRetry = mayRetry;
    this.onChange = onChange;
    this.autoplay = autoplay;
    this.wantsPlay = autoplay();
    this.wantsSound = sound();
    this.source = null;
    this.loaded = null;
    this.started = false;
    this.tries = 0;
    this.isWaiting = false;
    this.hasFailed = false;
    this.video = this.#newVideo();
    stage.prepend(this.video);
  }

  get isStream() {
    return this.loaded?.isStream ?? false;
  }

  get isPlaying() {
    return !this.video.paused && !this.video.ended;
  }

  /** A picture is there. */
  get hasPicture() {
    return this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA || this.video.currentTime > 0;
  }

  get time() {
    return this.video.currentTime;
  }

  get isMuted() {
    return this.video.muted;
  }

  /** Shows the growing file at `url`, from its beginning. */
  showStream(url) {
    this.#show({ url, isStream: true });
  }

  /** Shows a finished file; where a stream plays, at its time and with its sound, and in one step. */
  showFile(url) {
    this.#show({ url, isStream: false });
  }

  /** The element is on the screen (again): loads what was asked for, and goes on after it was taken off the page. */
  start() {
    this.started = true;
    this.#load();
    if (this.loaded && this.video.paused && this.#goesOn()) this.#play(this.video);
  }

  /** A new run: back to what the settings say about autoplay. */
  rewind() {
    this.wantsPlay = this.autoplay();
  }

  toggle() {
    const video = this.video;
    if (this.isPlaying) {
      this.wantsPlay = false;
      video.pause();
      return;
    }
    this.wantsPlay = true;
    if (!this.isStream && isAtEnd(video)) video.currentTime = 0;
    this.#play(video);
  }

  toggleSound() {
    this.wantsSound = this.video.muted;
    this.video.muted = !this.wantsSound;
    // The click is what lets a browser play sound: use it.
    if (this.wantsSound && this.video.paused && this.#goesOn()) this.#play(this.video);
    this.onChange();
  }

  /** Whether `seek` can go to `seconds`: a growing file without a length has nothing but what plays. */
  canSeek(seconds) {
    const { seekable } = this.video;
    for (let i = 0; i < seekable.length; i += 1) {
      if (seekable.end(i) > seekable.start(i) && seconds >= seekable.start(i) && seconds <= seekable.end(i) + 0.05) return true;
    }
    return false;
  }

  seek(seconds) {
    if (this.canSeek(seconds)) this.video.currentTime = seconds;
  }

  fullscreen() {
    this.video.requestFullscreen?.().catch(() => {});
  }

  /** Lets go of the download: without this a removed node would read the stream to its end. */
  release() {
    this.source = null;
    this.loaded = null;
    this.started = false;
    if (this.next) discard(this.next);
    this.next = null;
    empty(this.video);
  }

  #show(source) {
    if (this.source?.url === source.url) return;
    this.source = source;
    this.tries = 0;
    this.hasFailed = false;
    this.#load();
  }

  #load() {
    const source = this.source;
    if (!this.started || !source || this.loaded?.url === source.url || this.next?.getAttribute("src") === source.url) return;
    if (this.next) discard(this.next);
    this.next = null;
    if (this.isStream && !source.isStream && this.hasPicture) {
      this.#changeOver(source);
      return;
    }
    this.loaded = source;
    this.video.muted = !this.wantsSound;
    this.video.preload = this.wantsPlay || !source.isStream ? "auto" : "none";
    this.video.src = source.url;
    if (this.wantsPlay) this.#play(this.video);
    this.onChange();
  }

  /** Loads the finished file behind the one that plays, waits for the same moment, and puts it in front. */
  async #changeOver(source) {
    const old = this.video;
    const fresh = this.#newVideo();
    this.next = fresh;
    const isCurrent = () => this.next === fresh;
    fresh.muted = true;
    fresh.preload = "auto";
    fresh.classList.add("joyavatar-behind");
    fresh.src = source.url;
    this.stage.prepend(fresh);
    const isThere = await happens(fresh, "loadedmetadata");
    if (!isCurrent()) return;
    if (!isThere) {
      // The growing file is still in the element and plays: keep it, and try again.
      discard(fresh);
      this.next = null;
      this.tries += 1;
      if (this.tries <= RETRIES) setTimeout(() => this.#load(), 1000 * this.tries);
      return;
    }
    await meet(old, fresh);
    if (!isCurrent()) return;
    // The growing file may have ended early, by a lost connection or a viewer that was late.
    const goesOn = () => this.wantsPlay && !isAtEnd(fresh);
    if (goesOn()) await this.#play(fresh);
    await frameOf(fresh);
    if (!isCurrent()) return;
    this.next = null;
    this.loaded = source;
    this.video = fresh;
    fresh.muted = old.muted;
    fresh.volume = old.volume;
    fresh.classList.remove("joyavatar-behind");
    if (!this.wantsPlay) fresh.pause();
    discard(old);
    // Some browsers pause an element that is unmuted without a click on it.
    if (fresh.paused && goesOn()) this.#play(fresh);
    this.onChange();
  }

  /** Should play, and would not begin again from the start. */
  #goesOn() {
    return this.wantsPlay && !this.video.ended && (this.isStream || !isAtEnd(this.video));
  }

  async #play(video) {
    try {
      await video.play();
    } catch (error) {
      if (error.name !== "NotAllowedError" || video.muted) return;
      // No click on the page yet: without sound it may play, and the sound button is there.
      video.muted = true;
      await video.play().catch(() => {});
    }
    this.onChange();
  }

  #newVideo() {
    const video = document.createElement("video");
    video.className = "joyavatar-video";
    video.muted = true;
    video.playsInline = true;
    video.setAttribute("aria-label", this.label);
    const events = ["play", "playing", "timeupdate", "volumechange", "durationchange", "loadeddata", "seeked"];
    for (const name of events) video.addEventListener(name, () => this.#changed(video, false));
    video.addEventListener("waiting", () => this.#changed(video, true));
    video.addEventListener("pause", () => this.#paused(video));
    video.addEventListener("play", () => {
      if (hasOwnControls(video)) this.wantsPlay = true;
    });
    video.addEventListener("ended", () => this.#ended(video));
    video.addEventListener("error", () => this.#failed(video));
    video.addEventListener("fullscreenchange", () => {
      video.controls = document.fullscreenElement === video;
    });
    return video;
  }

  #changed(video, isWaiting) {
    if (video !== this.video) return;
    this.isWaiting = isWaiting;
    if (video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) this.hasFailed = false;
    this.onChange();
  }

  #paused(video) {
    if (video !== this.video) return;
    // A browser pauses a video that leaves the page; only a pause in the browser's own controls is the user's wish.
    if (hasOwnControls(video) && !video.ended) this.wantsPlay = false;
    this.onChange();
  }

  #ended(video) {
    if (video !== this.video) return;
    this.onChange();
    if (this.isStream) this.#again(video, 3000);
  }

  #failed(video) {
    if (video !== this.video || !video.getAttribute("src")) return;
    this.hasFailed = this.isStream;
    this.onChange();
    if (this.isStream) this.#again(video, 1000 * 2 ** this.tries);
  }

  /** Asks for the stream once more after a lost connection, unless its file came in the meantime. */
  #again(video, delay) {
    const source = this.source;
    if (!source?.isStream || this.tries >= RETRIES) return;
    this.tries += 1;
    setTimeout(() => {
      if (video !== this.video || this.source !== source || !this.started || !this.mayRetry()) return;
      video.src = source.url;
      if (this.wantsPlay) this.#play(video);
    }, delay);
  }
}

function isAtEnd(video) {
  return video.ended || (video.duration > 0 && video.currentTime >= video.duration - AT_END_SECONDS);
}

function hasOwnControls(video) {
  return document.fullscreenElement === video || document.pictureInPictureElement === video;
}

function empty(video) {
  video.pause();
  video.removeAttribute("src");
  video.load();
}

function discard(video) {
  empty(video);
  video.remove();
}

function happens(video, name) {
  return new Promise((resolve) => {
    video.addEventListener(name, () => resolve(true), { once: true });
    video.addEventListener("error", () => resolve(false), { once: true });
    setTimeout(() => resolve(video.readyState >= HTMLMediaElement.HAVE_METADATA), CHANGE_OVER_LIMIT_MS);
  });
}

/** Brings `fresh` to the moment that `old` shows then. Where seeking takes longer than the lead, the next lead is longer. */
async function meet(old, fresh) {
  const moves = () => !old.paused && !old.ended;
  let lead = LEAD_SECONDS;
  for (let seeks = 0; seeks < SEEKS; seeks += 1) {
    const from = old.currentTime;
    fresh.currentTime = Math.min(from + (moves() ? lead : 0), fresh.duration || 0);
    await happens(fresh, "seeked");
    if (old.currentTime <= fresh.currentTime + 0.03) break;
    lead = LEAD_SECONDS + 1.5 * (old.currentTime - from);
  }
  await until(() => !moves() || old.currentTime >= fresh.currentTime - 0.03);
}

async function until(isSo) {
  const limit = performance.now() + MEET_LIMIT_MS;
  while (!isSo() && performance.now() < limit) await new Promise((resolve) => setTimeout(resolve, 15));
}

/** Resolves when a frame of `video` was drawn, or soon. */
function frameOf(video) {
  return new Promise((resolve) => {
    video.requestVideoFrameCallback?.(() => resolve());
    setTimeout(resolve, video.paused ? 120 : 300);
  });
}
