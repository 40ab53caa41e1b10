// One thing that a user may do with the live preview, in ComfyUI's own front end and with the real nodes.
//
//   node preview.mjs URL RENDERER CHROMIUM DEED
//
// RENDERER is canvas or nodes2, DEED a name of `deeds` below. The host's input folder holds a.wav, b.wav (longer)
// and long.wav (minutes). JOYAVATAR_PLAYWRIGHT as in page.mjs. Output: JSON {errors, ...what was seen}.

import { randomInt, randomUUID } from "node:crypto";
import { SETTLE_MS, inBrowser, ready, workflow } from "./page.mjs";

const LIVE_MS = 90_000;
const END_MS = 300_000;
const OUTPUT = "JoyAvatarStreamToVideo";
const SMALL = { size: "custom", width: 64, height: 64 };
const COLLAPSE = "Comfy.Canvas.ToggleSelectedNodes.Collapse";

const [url, renderer, chromiumPath, name] = process.argv.slice(2);

/** The talking_avatar workflow with another sound (null: its own), small, and under an id that no run had before. */
async function load(page, sound, { id = randomUUID(), name = "trial", seed = randomInt(1e9), ...values } = {}) {
  const graph = { ...workflow("talking_avatar"), id };
  await page.evaluate((given) => window.trial.load(...given), [graph, name, sound, { ...SMALL, seed, ...values }]);
  await page.waitForTimeout(SETTLE_MS);
}

const press = (page) => page.evaluate(() => void window.app.queuePrompt(0));
const look = (page, type = OUTPUT) => page.evaluate((type) => window.trial.looks(type), type);
const sessions = (page) => page.evaluate(() => window.trial.sessions());
const select = (page, type) =>
  page.evaluate((type) => {
    const [node] = window.trial.all(type);
    window.app.canvas.deselectAll?.();
    window.app.canvas.selectNode(node);
  }, type);

/** Waits until a panel shows what is asked for: `test` is the text of a function of a look. */
async function until(page, test, { type = OUTPUT, index = 0, limit = LIVE_MS } = {}) {
  try {
    await page.waitForFunction(
      ([type, index, text]) => {
        const seen = window.trial.looks(type)[index];
        return Boolean(seen && new Function("seen", `return ${text}`)(seen));
      },
      [type, index, test],
      { timeout: limit, polling: 50 },
    );
  } catch {
    throw new Error(`never ${test}: ${JSON.stringify(await look(page, type))}`);
  }
  return (await look(page, type))[index];
}

const PLAYS = "seen.sid && seen.time > 0.5";
const live = (page, options) => until(page, PLAYS, options);
const finished = (page, options) => until(page, "seen.badge === 'Done' && seen.file", { limit: END_MS, ...options });
const cancel = (page) => page.evaluate(() => fetch("/interrupt", { method: "POST" }));

/** The looks of a panel now and a while later. */
async function twice(page, milliseconds = 1500) {
  const [before] = await look(page);
  await page.waitForTimeout(milliseconds);
  const [after] = await look(page);
  return { before, after };
}

async function lastSession(page) {
  return (await sessions(page)).at(-1);
}

/** The last run, as soon as `test` holds for it. */
async function untilSession(page, test) {
  for (const end = Date.now() + END_MS; Date.now() < end; await page.waitForTimeout(200)) {
    const session = await lastSession(page);
    if (session && test(session)) return session;
  }
  throw new Error(`never ${test}`);
}

const deeds = {
  /** Two outputs in one workflow: a picture and a voice for each. */
  async two_outputs({ page }) {
    await load(page, "a.wav");
    await page.evaluate(() => {
      const { trial } = window;
      trial.secondChain("robot", "b.wav");
      trial.show(...trial.all("JoyAvatarStreamToVideo"));
    });
    await press(page);
    const seen = [];
    const began = Date.now();
    while (Date.now() - began < END_MS) {
      const looks = await look(page);
      seen.push(looks);
      if (looks.every((one) => one.badge === "Done" && one.file)) break;
      await page.waitForTimeout(150);
    }
    return { seen, sessions: await sessions(page) };
  },

  /** Two open workflows with the same ids of nodes, both queued: the second waits for the first. */
  async two_workflows({ page }) {
    await load(page, "long.wav", { name: "first" });
    await press(page);
    const first = await live(page);
    await load(page, "b.wav", { name: "second" });
    const waiting = (await look(page))[0];
    await press(page);
    await page.waitForTimeout(SETTLE_MS);
    const queued = (await look(page))[0];
    await cancel(page);
    await finished(page);
    return { first, waiting, queued, second: (await look(page))[0], sessions: await sessions(page) };
  },

  async collapse({ page }) {
    await load(page, "long.wav");
    await press(page);
    const before = await live(page);
    await select(page, OUTPUT);
    const toggle = () => page.evaluate((id) => window.app.extensionManager.command.execute(id), COLLAPSE);
    await toggle();
    await page.waitForTimeout(1500);
    const collapsed = await page.evaluate((type) => window.trial.all(type)[0].flags.collapsed, OUTPUT);
    const closed = (await look(page))[0];
    await toggle();
    const opened = await until(page, `seen.wide > 0 && seen.time > ${closed.time} && !seen.paused`);
    const later = (await twice(page)).after;
    const state = (await lastSession(page)).state;
    await cancel(page);
    return { before, collapsed, closed, opened, later, state };
  },

  /** The node is deleted while it runs; the run is cancelled later. */
  async removal({ page }) {
    await load(page, "long.wav");
    await press(page);
    await live(page);
    const before = await lastSession(page);
    await select(page, OUTPUT);
    await page.evaluate(() => window.app.canvas.deleteSelected());
    const after = await untilSession(page, (session) => session.blocks > before.blocks + 4);
    const videos = await page.evaluate(() => document.querySelectorAll(".joyavatar-live video").length);
    await cancel(page);
    await untilSession(page, (session) => session.state !== "running");
    return { left: await look(page), videos, before, after };
  },

  async subgraph({ page }) {
    await load(page, "long.wav");
    const outer = await page.evaluate((type) => {
      const { app, trial } = window;
      return String(app.graph.convertToSubgraph(new Set(trial.all(type))).node.id);
    }, OUTPUT);
    await press(page);
    await untilSession(page, (session) => session.node === `${outer}:7` && session.blocks > 2);
    await page.evaluate((id) => {
      const { app, trial } = window;
      const node = trial.nodes().find((candidate) => String(candidate.id) === id);
      app.canvas.openSubgraph(node.subgraph, node);
      trial.show(...trial.all("JoyAvatarStreamToVideo"));
    }, outer);
    const playing = await live(page);
    const later = (await twice(page)).after;
    const session = await lastSession(page);
    await page.evaluate(() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph));
    await cancel(page);
    await page.waitForTimeout(SETTLE_MS);
    return { outer, playing, later, session };
  },

  /** A click on the strip of a finished video, a click on its retake button, Run. */
  async retake({ page }) {
    await load(page, "b.wav", { retake_every: 2 });
    await press(page);
    await finished(page);
    const box = await page.locator(".joyavatar-blocks").boundingBox();
    await page.mouse.click(box.x + box.width * 0.5, box.y + box.height / 2);
    const button = page.locator(".joyavatar-retake");
    await button.waitFor();
    const asked = await button.textContent();
    await button.click();
    const note = (await until(page, "seen.note.includes('Retake')")).note;
    const retake = "JoyAvatarRetake";
    const values = await page.evaluate((type) => {
      const [node] = window.trial.all(type);
      window.trial.show(...window.trial.all("JoyAvatarStreamToVideo"), node);
      return Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
    }, retake);
    await press(page);
    const taken = await finished(page, { type: retake });
    return { asked, note, values, first: (await look(page))[0], taken, sessions: await sessions(page) };
  },

  async reload({ page }) {
    await load(page, "long.wav");
    await page.waitForTimeout(3 * SETTLE_MS);
    await press(page);
    const before = await live(page);
    await page.reload();
    await ready(page);
    const after = await live(page);
    const later = (await twice(page)).after;
    const session = await lastSession(page);
    await cancel(page);
    const kept = await until(page, "seen.badge === 'Cancelled' && seen.file");
    return { before, after, later, session, kept };
  },

  /** From Run to the finished video; whoever calls this holds up the host, so that playback catches up with the making. */
  async slow({ page }) {
    await load(page, "a.wav", { size: "256x256" });
    await page.evaluate(() => window.trial.record());
    await press(page);
    await finished(page);
    return page.evaluate(() => window.trial.recorded);
  },

  /** The change-over to the finished file where seeking takes a second. Playback is slow until then, so as to be under way. */
  async late_seek({ page }) {
    await load(page, "b.wav");
    await page.evaluate(() => {
      const time = Object.getOwnPropertyDescriptor(HTMLMediaElement.prototype, "currentTime");
      const late = (video, value) => setTimeout(() => time.set.call(video, value), 1000);
      Object.defineProperty(HTMLMediaElement.prototype, "currentTime", { ...time, set(value) { late(this, value); } });
      const pace = (rate) => document.querySelectorAll("video").forEach((video) => (video.playbackRate = rate));
      const isStream = (video) => video.src.includes("/stream/");
      document.addEventListener("playing", ({ target }) => isStream(target) && pace(0.0625), true);
      document.addEventListener("loadstart", ({ target }) => !isStream(target) && pace(1), true);
      window.trial.record();
    });
    await press(page);
    await finished(page);
    await page.waitForTimeout(SETTLE_MS);
    return page.evaluate(() => window.trial.recorded);
  },

  /** Run with nothing changed: in the same page, and in a fresh one that is told of no runs but by this. */
  async cached({ page, open }) {
    const seed = Math.floor(Math.random() * 1e9);
    await load(page, null, { seed });
    await press(page);
    const first = await finished(page);
    const runs = (await sessions(page)).length;
    await press(page);
    await page.waitForTimeout(2 * SETTLE_MS);
    const again = (await look(page))[0];
    const fresh = await open();
    await fresh.route("**/joyavatar/sessions", (route) => route.abort());
    await load(fresh, null, { seed });
    const empty = (await look(fresh))[0];
    await press(fresh);
    const shown = await finished(fresh);
    const playing = await until(fresh, "seen.time > 0.5");
    return { first, again, empty, shown, playing, runs: [runs, (await sessions(page)).length] };
  },
};

const told = await inBrowser({ url, renderer, chromiumPath }, deeds[name]);
process.stdout.write(JSON.stringify(told));
