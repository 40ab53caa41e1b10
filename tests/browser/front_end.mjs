// Loads workflows in ComfyUI's own front end and prints, as JSON, what came of each.
//
//   node front_end.mjs URL RENDERER CHROMIUM WORKFLOW.json ...
//
// RENDERER is canvas or nodes2. JOYAVATAR_PLAYWRIGHT names the folder whose node_modules holds playwright-core.
// Output: {version, started: [page errors before the first workflow],
// workflows: {NAME: {missing: [node types], errors: [page errors], output: the API prompt}}}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";

const NODE = "JoyAvatarStreamToVideo"; // the front end is ready when it knows this one
const START_MS = 120_000;
const SETTLE_MS = 1_000; // time for late errors: widgets are mounted after a graph is loaded

const [url, renderer, chromiumPath, ...files] = process.argv.slice(2);
const require = createRequire(join(resolve(process.env.JOYAVATAR_PLAYWRIGHT), "here.js"));
const { chromium } = require("playwright-core");

const isReady = (name) => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.[name]);

async function ready(page) {
  await page.waitForFunction(isReady, NODE, { timeout: START_MS });
  await page.waitForTimeout(SETTLE_MS);
}

async function chooseRenderer(page) {
  await page.evaluate(async (nodes2) => {
    const settings = window.app.extensionManager.setting;
    await settings.set("Comfy.TutorialCompleted", true);
    await settings.set("Comfy.VueNodes.Enabled", nodes2);
  }, renderer === "nodes2");
  await page.reload({ timeout: START_MS });
  await ready(page);
}

// Runs in the page. Node types the host does not know have no class; `_meta` holds translated titles.
async function load([workflow, name, wait]) {
  await window.app.loadGraphData(workflow, true, true, name);
  await new Promise((done) => setTimeout(done, wait));
  const nodes = window.app.graph.nodes ?? window.app.graph._nodes;
  const missing = workflow.nodes
    .filter((node) => {
      const loaded = nodes.find((other) => String(other.id) === String(node.id));
      return !loaded || !window.LiteGraph.registered_node_types[loaded.type];
    })
    .map((node) => node.type);
  const { output } = await window.app.graphToPrompt();
  for (const node of Object.values(output)) delete node._meta;
  return { missing, output };
}

async function main() {
  const browser = await chromium.launch({
    executablePath: chromiumPath,
    args: ["--no-sandbox", "--use-gl=swiftshader"],
  });
  try {
    const page = await browser.newPage();
    const errors = [];
    page.on("pageerror", (error) => errors.push(error.message));
    await page.goto(url, { timeout: START_MS });
    await ready(page);
    await chooseRenderer(page);
    const started = errors.splice(0);
    const workflows = {};
    for (const file of files) {
      const name = basename(file, ".json");
      const workflow = JSON.parse(readFileSync(file, "utf8"));
      workflows[name] = await page.evaluate(load, [workflow, name, SETTLE_MS]);
      workflows[name].errors = errors.splice(0);
    }
    const version = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__ ?? null);
    process.stdout.write(JSON.stringify({ version, started, workflows }));
  } finally {
    await browser.close();
  }
}

await main();
