// The looks of the live preview: one <style> element, classes with a prefix, colours of the host's theme.

const CSS = `
.joyavatar-live {
  --joyavatar-text: var(--base-foreground, var(--input-text, #ddd));
  --joyavatar-quiet: var(--muted-foreground, var(--descrip-text, #999));
  --joyavatar-line: var(--border-subtle, var(--border-color, #4e4e4e));
  --joyavatar-well: var(--component-node-widget-background, var(--comfy-input-bg, #222));
  --joyavatar-done: var(--primary-background, #3b82f6);
  --joyavatar-window: color-mix(in srgb, var(--joyavatar-done) 45%, var(--joyavatar-to-come));
  --joyavatar-to-come: color-mix(in srgb, var(--joyavatar-quiet) 30%, transparent);
  --joyavatar-span: var(--warning-background, #eab308);
  --joyavatar-head: var(--joyavatar-text);
  --joyavatar-bad: color-mix(in srgb, var(--destructive-background, #e5484d) 72%, var(--joyavatar-text));
  display: flex;
  flex-direction: column;
  gap: 6px;
  box-sizing: border-box;
  width: 100%;
  height: 100%;
  min-height: 280px;
  padding: 2px 0 4px;
  overflow: hidden;
  color: var(--joyavatar-text);
  font: 12px/1.35 Inter, system-ui, sans-serif;
  text-align: start;
  user-select: none;
}
.joyavatar-live [hidden] { display: none !important; }
.joyavatar-live button {
  display: inline-flex;
  align-items: center;
  justify-content: center;
  gap: 5px;
  margin: 0;
  border: 0;
  font: inherit;
  cursor: pointer;
}
.joyavatar-live :is(button, .joyavatar-blocks):focus-visible {
  outline: 2px solid var(--joyavatar-done);
  outline-offset: 1px;
}
.joyavatar-icon { width: 14px; height: 14px; flex: none; fill: currentColor; }

.joyavatar-stage {
  position: relative;
  flex: 1 1 0;
  min-height: 120px;
  overflow: hidden;
  border-radius: 8px;
  background: #0b0b0d;
  color: #fff;
}
.joyavatar-stage.joyavatar-bare { background: var(--joyavatar-well); color: var(--joyavatar-quiet); }
.joyavatar-video { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.joyavatar-video.joyavatar-behind { z-index: 0; opacity: 0.01; }
.joyavatar-bare .joyavatar-video { visibility: hidden; }
.joyavatar-empty {
  position: absolute;
  inset: 0;
  display: flex;
  flex-direction: column;
  align-items: center;
  justify-content: center;
  gap: 10px;
  padding: 16px;
  text-align: center;
}
.joyavatar-empty .joyavatar-icon { width: 32px; height: 32px; opacity: 0.5; }

.joyavatar-badge, .joyavatar-sound {
  position: absolute;
  top: 8px;
  height: 24px;
  padding: 0 9px;
  border-radius: 12px;
  background: rgb(0 0 0 / 0.62);
  color: #fff;
  font-size: 11px;
  line-height: 24px;
  white-space: nowrap;
}
.joyavatar-badge { left: 8px; display: inline-flex; align-items: center; gap: 6px; max-width: 60%; pointer-events: none; }
.joyavatar-badge::before { content: ""; width: 7px; height: 7px; flex: none; border-radius: 50%; background: #9ca3af; }
.joyavatar-badge[data-state="live"]::before { background: #ef4444; animation: joyavatar-pulse 1.4s ease-in-out infinite; }
.joyavatar-badge[data-state="wait"]::before { background: #f59e0b; animation: joyavatar-pulse 1.4s ease-in-out infinite; }
.joyavatar-badge[data-state="done"]::before { background: #22c55e; }
.joyavatar-badge[data-state="cancelled"]::before { background: #f59e0b; }
.joyavatar-badge[data-state="failed"]::before { background: #ef4444; }
@keyframes joyavatar-pulse { 50% { opacity: 0.25; } }
@media (prefers-reduced-motion: reduce) { .joyavatar-badge::before { animation: none !important; } }
.joyavatar-live .joyavatar-sound { right: 8px; }
.joyavatar-live .joyavatar-sound:hover { background: rgb(0 0 0 / 0.85); }
.joyavatar-live .joyavatar-sound[data-muted="true"] { background: #fff; color: #111; font-weight: 600; }
.joyavatar-live .joyavatar-sound[data-muted="true"]:hover { background: #e5e7eb; }

.joyavatar-live .joyavatar-play {
  position: absolute;
  top: 50%;
  left: 50%;
  width: 52px;
  height: 52px;
  border-radius: 50%;
  background: rgb(0 0 0 / 0.6);
  color: #fff;
  transform: translate(-50%, -50%);
}
.joyavatar-live .joyavatar-play:hover { background: rgb(0 0 0 / 0.8); }
.joyavatar-play .joyavatar-icon { width: 24px; height: 24px; }
.joyavatar-bar {
  position: absolute;
  inset: auto 0 0;
  display: flex;
  align-items: center;
  gap: 8px;
  padding: 18px 8px 6px;
  background: linear-gradient(transparent, rgb(0 0 0 / 0.7));
  font-variant-numeric: tabular-nums;
  opacity: 0;
  transition: opacity 0.15s;
}
.joyavatar-stage:is(:hover, :focus-within) .joyavatar-bar { opacity: 1; }
.joyavatar-bar .joyavatar-time { flex: 1; }
.joyavatar-live .joyavatar-bar button { width: 26px; height: 26px; border-radius: 6px; background: none; color: #fff; }
.joyavatar-live .joyavatar-bar button:hover { background: rgb(255 255 255 / 0.2); }

.joyavatar-strip { position: relative; flex: none; height: 22px; }
.joyavatar-blocks { display: block; width: 100%; height: 100%; border-radius: 4px; cursor: pointer; touch-action: none; }
.joyavatar-tip {
  position: absolute;
  bottom: calc(100% + 4px);
  z-index: 2;
  padding: 2px 8px;
  border-radius: 6px;
  background: rgb(0 0 0 / 0.85);
  color: #fff;
  font-size: 11px;
  font-variant-numeric: tabular-nums;
  white-space: nowrap;
  transform: translateX(-50%);
  pointer-events: none;
}

.joyavatar-figures { display: grid; flex: none; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 4px; margin: 0; }
.joyavatar-figure { padding: 4px 8px; border-radius: 6px; background: var(--joyavatar-well); min-width: 0; }
.joyavatar-figure dt, .joyavatar-figure dd { overflow: hidden; margin: 0; text-overflow: ellipsis; white-space: nowrap; }
.joyavatar-figure dt { color: var(--joyavatar-quiet); font-size: 10px; font-weight: 400; }
.joyavatar-figure dd { font-size: 12px; font-variant-numeric: tabular-nums; }
.joyavatar-figure[data-tone="bad"] dd { color: var(--joyavatar-bad); }

.joyavatar-foot { display: flex; flex: none; align-items: center; gap: 6px; min-height: 26px; }
.joyavatar-note {
  flex: 1;
  min-width: 0;
  max-height: 4.1em;
  overflow: auto;
  overflow-wrap: anywhere;
  color: var(--joyavatar-quiet);
  font-size: 11px;
  user-select: text;
}
.joyavatar-note[data-tone="bad"] { color: var(--joyavatar-bad); }
.joyavatar-live .joyavatar-retake {
  height: 26px;
  padding: 0 12px;
  border-radius: 6px;
  background: var(--joyavatar-done);
  color: #fff;
  font-weight: 600;
  font-variant-numeric: tabular-nums;
}
.joyavatar-live .joyavatar-retake:hover { filter: brightness(1.1); }
.joyavatar-live .joyavatar-clear { width: 26px; height: 26px; border-radius: 6px; background: var(--joyavatar-well); color: inherit; }
`;

/** A <style> element for the inside of a panel: nothing is put into the shared page. */
export function styleElement() {
  const style = document.createElement("style");
  style.textContent = CSS;
  return style;
}

const ICONS = {
  play: "M8 5v14l11-7z",
  pause: "M6 5h4v14H6zM14 5h4v14h-4z",
  soundOff: "M4 9v6h4l5 5V4L8 9zM16.5 9.1 19.4 12l-2.9 2.9 1.2 1.2 2.9-2.9 2.9 2.9 .9-1.2-2.7-2.9 2.7-2.9-1.1-1.2-2.7 2.9-2.9-2.9z",
  soundOn: "M4 9v6h4l5 5V4L8 9zM15 8.5v7a4 4 0 0 0 0-7zM15 4.2v2.1a6 6 0 0 1 0 11.4v2.1a8 8 0 0 0 0-15.6z",
  fullscreen: "M5 14H3v7h7v-2H5zM3 10h2V5h5V3H3zM19 19h-5v2h7v-7h-2zM14 3v2h5v5h2V3z",
  close: "M18.3 7.1 16.9 5.7 12 10.6 7.1 5.7 5.7 7.1 10.6 12l-4.9 4.9 1.4 1.4 4.9-4.9 4.9 4.9 1.4-1.4-4.9-4.9z",
  film: "M4 4h16a2 2 0 0 1 2 2v12a2 2 0 0 1-2 2H4a2 2 0 0 1-2-2V6a2 2 0 0 1 2-2zm6 4.5v7l6-3.5z",
};

/** An <svg> with one of the drawings above. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "joyavatar-icon");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  path.setAttribute("fill-rule", "evenodd");
  svg.append(path);
  return svg;
}
