// What the line of figures says: numbers of a `joyavatar.progress` detail as short texts.

const NOTHING = "–";

/** 75 -> "1:15", 3675 -> "1:01:15". */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (value) => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** 3 -> "3", 2.25 -> "2.25": seconds without zeros at the end. */
export function short(seconds) {
  return String(Math.round(seconds * 100) / 100);
}

/** Seconds that are in the file so far; at the end: its length. */
export function madeSeconds(detail) {
  if (isNumber(detail.frames) && detail.source_fps > 0) return detail.frames / detail.source_fps;
  return detail.total_seconds ?? 0;
}

export function isOver(detail) {
  return detail.state !== "running";
}

/** Pairs of a label and a text, four of them; `tone` is "bad" where playback is faster than the making. */
export function figuresOf(detail, words) {
  return isOver(detail) ? figuresOfTheEnd(detail, words) : figuresOfNow(detail, words);
}

function figuresOfNow(detail, words) {
  const behind = isNumber(detail.ahead_s) && detail.ahead_s < 0;
  return [
    { label: words("fps"), text: number(detail.fps, 1) },
    { label: words("first"), text: inSeconds(detail.first_frame_s, words) },
    { label: words("ahead"), text: signed(detail.ahead_s, words), tone: behind ? "bad" : "" },
    { label: words("eta"), text: isNumber(detail.eta_s) ? clock(Math.ceil(detail.eta_s)) : NOTHING },
  ];
}

function figuresOfTheEnd(detail, words) {
  const length = madeSeconds(detail);
  const made = isNumber(detail.made) && detail.source_fps > 0 ? detail.made / detail.source_fps : length;
  const speed = detail.elapsed_s > 0 ? made / detail.elapsed_s : null;
  return [
    { label: words("length"), text: length < 60 ? inSeconds(length, words) : clock(length) },
    { label: words("frames"), text: number(detail.frames, 0) },
    { label: words("took"), text: isNumber(detail.elapsed_s) ? took(detail.elapsed_s, words) : NOTHING },
    { label: words("speed"), text: speed ? words("times", speed.toFixed(speed < 10 ? 2 : 0)) : NOTHING },
  ];
}

function took(seconds, words) {
  return seconds < 60 ? inSeconds(seconds, words) : clock(seconds);
}

function number(value, digits) {
  return isNumber(value) ? value.toFixed(digits) : NOTHING;
}

function inSeconds(value, words) {
  return isNumber(value) ? words("seconds", value.toFixed(1)) : NOTHING;
}

function signed(value, words) {
  if (!isNumber(value)) return NOTHING;
  return words("seconds", (value < 0 ? "−" : "+") + Math.abs(value).toFixed(1));
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}
