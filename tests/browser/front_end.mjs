// Loads workflows in ComfyUI's own front end and prints, as JSON, what came of each.
//
//   node front_end.mjs URL RENDERER CHROMIUM WORKFLOW.json ...
//
// RENDERER is canvas or nodes2. JOYAVATAR_PLAYWRIGHT as in page.mjs.
// Output: {version, started: [page errors before the first workflow],
// workflows: {NAME: {missing: [node types], errors: [page errors], output: the API prompt}}}.

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { SETTLE_MS, inBrowser } from "./page.mjs";

const [url, renderer, chromiumPath, ...files] = process.argv.slice(2);

// Runs in the page. Node types the host does not know have no class; `_meta` holds translated titles.
async function load([workflow, name, wait]) {
  await window.app.loadGraphData(workflow, true, true, name);
  await new Promise((done) => setTimeout(done, wait));
  const nodes = window.trial.nodes();
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

const told = await inBrowser({ url, renderer, chromiumPath }, async ({ page, errors }) => {
  const started = errors.splice(0);
  const workflows = {};
  for (const file of files) {
    const name = basename(file, ".json");
    const workflow = JSON.parse(readFileSync(file, "utf8"));
    workflows[name] = await page.evaluate(load, [workflow, name, SETTLE_MS]);
    workflows[name].errors = errors.splice(0);
  }
  const version = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__ ?? null);
  return { version, started, workflows };
});
process.stdout.write(JSON.stringify(told));
