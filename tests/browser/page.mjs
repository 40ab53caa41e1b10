// What the tests in the browser share: Chromium, and a page with the host's front end in one of its renderers.
//
// JOYAVATAR_PLAYWRIGHT names the folder whose node_modules holds playwright-core.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));
const NODE = "JoyAvatarStreamToVideo"; // the front end is ready when it knows this one
const START_MS = 120_000;
export const SETTLE_MS = 1_000; // widgets are mounted after a graph is loaded, drafts are kept later still

const { chromium } = createRequire(join(resolve(process.env.JOYAVATAR_PLAYWRIGHT), "here.js"))("playwright-core");

const isReady = (name) => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.[name]);

/** An example workflow of the pack. */
export function workflow(name) {
  return JSON.parse(readFileSync(join(HERE, "..", "..", "workflows", `${name}.json`), "utf8"));
}

/** Settings lie on the server, so that every page of this host gets them. renderer: canvas or nodes2. */
async function choose(url, renderer) {
  const settings = { "Comfy.TutorialCompleted": true, "Comfy.VueNodes.Enabled": renderer === "nodes2" };
  const answer = await fetch(`${url}/settings`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(settings),
  });
  if (!answer.ok) throw new Error(`the host did not take the settings: ${answer.status}`);
}

export async function ready(page) {
  await page.waitForFunction(isReady, NODE, { timeout: START_MS });
  await page.waitForTimeout(SETTLE_MS);
}

/**
 * What `work({page, open, errors})` returns, and `errors`: those of all pages. open(): a further page, of a visitor of its
 * own.
 */
export async function inBrowser({ url, renderer, chromiumPath, size = { width: 1900, height: 1000 } }, work) {
  const browser = await chromium.launch({
    executablePath: chromiumPath,
    args: ["--no-sandbox", "--use-gl=swiftshader", "--autoplay-policy=no-user-gesture-required"],
  });
  const errors = [];
  const open = async () => {
    const page = await browser.newPage({ viewport: size });
    page.setDefaultTimeout(START_MS);
    page.on("pageerror", (error) => errors.push(String(error.message)));
    await page.addInitScript({ path: join(HERE, "in_page.js") });
    await page.goto(url);
    await ready(page);
    return page;
  };
  try {
    await choose(url, renderer);
    return { errors, ...(await work({ page: await open(), open, errors })) };
  } finally {
    await browser.close();
  }
}
