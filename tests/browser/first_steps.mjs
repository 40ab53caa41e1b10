// What a new user does, with the mouse only: the template browser, the workflow talking_avatar, Run.
//
//   node first_steps.mjs URL RENDERER CHROMIUM [SHOT-PREFIX]
//
// On a host that nobody has used yet. There are four screenshots: PREFIX_1.png to PREFIX_4.png.
// JOYAVATAR_PLAYWRIGHT as in page.mjs. Output, as JSON: {errors, templates: [names], live, done: looks of in_page.js}.

import { SETTLE_MS, inBrowser } from "./page.mjs";

const PACK = "ComfyUI-JoyAvatar";
const LIVE_MS = 90_000;
const END_MS = 300_000;

const [url, renderer, chromiumPath, shots] = process.argv.slice(2);

async function shot(page, number, clip) {
  if (shots) await page.screenshot({ path: `${shots}_${number}.png`, clip });
}

/** The look of the output node, once the text of `test` holds for it. */
async function when(page, test, timeout) {
  const look = (test) => {
    const [seen] = window.trial.looks();
    return seen && new Function("seen", `return ${test}`)(seen) ? seen : null;
  };
  return (await page.waitForFunction(look, test, { timeout, polling: 50 })).jsonValue();
}

const told = await inBrowser({ url, renderer, chromiumPath, size: { width: 1680, height: 900 } }, async ({ page }) => {
  const dialog = page.getByRole("dialog");
  if (!(await dialog.count())) await page.getByLabel("Templates").first().click();
  await dialog.getByText(PACK, { exact: true }).first().click();
  const card = dialog.getByText("talking_avatar", { exact: true });
  await card.waitFor();
  await page.waitForTimeout(3 * SETTLE_MS); // thumbnails
  const templates = (await dialog.innerText()).split("\n").filter((line) => /^[a-z]+(_[a-z]+)*$/.test(line));
  await shot(page, 1, await dialog.boundingBox());
  await card.click();
  await dialog.waitFor({ state: "detached" });
  await page.waitForTimeout(2 * SETTLE_MS);
  await shot(page, 2, { x: 0, y: 0, width: 1680, height: 800 });
  await page.getByTestId("queue-button").click();
  const live = await when(page, "seen.sid && seen.time > 1", LIVE_MS);
  await shot(page, 3, { x: 0, y: 0, width: 1680, height: 800 });
  const done = await when(page, "seen.badge === 'Done' && seen.file && seen.length", END_MS);
  await page.waitForTimeout(SETTLE_MS);
  const { x, y, width, height } = await page.locator(".joyavatar-live").boundingBox();
  await shot(page, 4, { x: x - 40, y: y - 200, width: width + 80, height: height + 240 });
  return { templates, live, done };
});
process.stdout.write(JSON.stringify(told));
