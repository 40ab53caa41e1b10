// Runs the talking_avatar workflow in ComfyUI's own front end on a sound of the input folder and watches the preview.
//
//   node live.mjs URL RENDERER CHROMIUM SOUND SECONDS [SHOT-PREFIX]
//
// RENDERER is canvas or nodes2, SOUND a file name in the host's input folder. JOYAVATAR_PLAYWRIGHT as in front_end.mjs.
// Output, as JSON: {errors, samples: [{at, time, state, blocks, waiting}]}: seconds since Run, the video's own time, and
// what the server says of the run at that moment.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const NODE = "JoyAvatarStreamToVideo";
const START_MS = 120_000;
const EVERY_MS = 100;

const [url, renderer, chromiumPath, sound, seconds, shots] = process.argv.slice(2);
const require = createRequire(join(resolve(process.env.JOYAVATAR_PLAYWRIGHT), "here.js"));
const { chromium } = require("playwright-core");
const workflow = JSON.parse(
  readFileSync(join(dirname(fileURLToPath(import.meta.url)), "..", "..", "workflows", "talking_avatar.json")),
);

const isReady = (name) => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.[name]);

async function open(browser, errors) {
  const page = await browser.newPage({ viewport: { width: 1900, height: 1000 } });
  page.on("pageerror", (error) => errors.push(String(error.message)));
  page.setDefaultTimeout(START_MS);
  for (const first of [true, false]) {
    await (first ? page.goto(url) : page.reload());
    await page.waitForFunction(isReady, NODE);
    await page.evaluate(async (nodes2) => {
      const settings = window.app.extensionManager.setting;
      await settings.set("Comfy.TutorialCompleted", true);
      await settings.set("Comfy.VueNodes.Enabled", nodes2);
    }, renderer === "nodes2");
  }
  return page;
}

/** Runs in the page: the workflow with Load Audio in place of the sample's voice, then Run. */
async function run([graph, file]) {
  const app = window.app;
  await app.loadGraphData(graph, true, true, "live");
  const nodes = app.graph.nodes ?? app.graph._nodes;
  const voice = nodes.find((node) => node.type === "JoyAvatarAudioEncoder");
  const load = window.LiteGraph.createNode("LoadAudio");
  load.pos = [60, 900];
  app.graph.add(load);
  load.widgets.find((widget) => widget.name === "audio").value = file;
  load.connect(0, voice, 0);
  await new Promise((done) => setTimeout(done, 1000));
  app.queuePrompt(0);
}

/** Runs in the page. */
async function look() {
  const video = document.querySelector(".joyavatar-live video:not(.joyavatar-behind)");
  const sessions = await (await fetch("/joyavatar/sessions")).json();
  const last = sessions.at(-1);
  return {
    time: video?.currentTime ?? 0,
    waiting: Boolean(video && !video.paused && !video.ended && video.readyState < 3),
    ended: video?.ended ?? false,
    state: last?.state ?? "",
    blocks: last?.blocks ?? 0,
  };
}

async function main() {
  const browser = await chromium.launch({
    executablePath: chromiumPath,
    args: ["--no-sandbox", "--use-gl=swiftshader", "--autoplay-policy=no-user-gesture-required"],
  });
  const errors = [];
  const samples = [];
  try {
    const page = await open(browser, errors);
    await page.evaluate(run, [workflow, sound]);
    const began = Date.now();
    let shown = "";
    while (Date.now() - began < 1000 * Number(seconds)) {
      const seen = await page.evaluate(look);
      samples.push({ at: (Date.now() - began) / 1000, ...seen });
      const stage = seen.time > 1 ? seen.state : "";
      if (shots && stage && stage !== shown) await page.screenshot({ path: `${shots}-${stage}.png` });
      shown = stage || shown;
      if (seen.ended && seen.state === "done") break;
      await page.waitForTimeout(EVERY_MS);
    }
  } finally {
    await browser.close();
  }
  process.stdout.write(JSON.stringify({ errors, samples }));
}

await main();
