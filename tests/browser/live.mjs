// Runs the talking_avatar workflow in ComfyUI's own front end on a sound of the input folder and watches the preview.
//
//   node live.mjs URL RENDERER CHROMIUM SOUND SECONDS [SHOT-PREFIX]
//
// RENDERER is canvas or nodes2, SOUND a file name in the host's input folder. JOYAVATAR_PLAYWRIGHT as in page.mjs.
// Output, as JSON, `at` in seconds since Run:
//   samples: [{at, time, length, ready, source, ended, paused, frames, blocks, state}]: of the video in front, every
//            100 ms; the last three are what the page was told of the run. `length`: as far as the browser has read.
//   events:  [{at, name, source, time, error}]: of the media elements. source: "stream" or "file".
//   tasks:   [{at, seconds}]: tasks of the page that took more than 50 ms.

import { randomUUID } from "node:crypto";
import { SETTLE_MS, inBrowser, workflow } from "./page.mjs";

const [url, renderer, chromiumPath, sound, seconds, shots] = process.argv.slice(2);
const EVERY_MS = 500;

const told = await inBrowser({ url, renderer, chromiumPath }, async ({ page }) => {
  const graph = { ...workflow("talking_avatar"), id: randomUUID() }; // so that runs of another page are not its own
  await page.evaluate((given) => window.trial.load(...given), [graph, "live", sound, { seed: Date.now() }]);
  await page.waitForTimeout(SETTLE_MS);
  await page.evaluate(() => {
    window.trial.record();
    window.app.queuePrompt(0);
  });
  let shown = "";
  for (const end = Date.now() + 1000 * Number(seconds); Date.now() < end; await page.waitForTimeout(EVERY_MS)) {
    const seen = await page.evaluate(() => window.trial.recorded.samples.at(-1));
    const stage = seen?.time > 1 ? seen.state : "";
    if (shots && stage && stage !== shown) await page.screenshot({ path: `${shots}-${stage}.png` });
    shown = stage || shown;
    if (seen?.source === "file" && seen.paused) break; // at its end, or taken over there
  }
  await page.evaluate(() => fetch("/interrupt", { method: "POST" }));
  return page.evaluate(() => window.trial.recorded);
});
process.stdout.write(JSON.stringify(told));
