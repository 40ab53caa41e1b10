// The live preview of JoyAvatar Stream to Video and JoyAvatar Retake: hooks into the host, and which run goes where.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { keptOutput, kindOf, makeRetake, nodeOfExecution, rootGraph } from "./live/graph.js";
import { Panel } from "./live/panel.js";
import { wordsOf } from "./live/words.js";

const KINDS = ["JoyAvatarStreamToVideo", "JoyAvatarRetake"];
const EVENT = "joyavatar.progress";
const AUTOPLAY = "JoyAvatar.Live.Autoplay";
const SOUND = "JoyAvatar.Live.Sound";
const STRIP = "JoyAvatar.Live.Strip";
const SMALLEST_HEIGHT = 300;
const FIRST_SIZE = [400, 0];
const FIRST_PREVIEW_HEIGHT = 420;
const MOST_RUNS = 200;
/** The id of a workflow that was never saved or loaded. */
const NO_WORKFLOW = "00000000-0000-0000-0000-000000000000";

/** Panels by node. */
const panels = new Map();
/** The last detail of every run this page has heard of, oldest first, by sid. */
const runs = new Map();

function setting(id, fallback) {
  return app.extensionManager?.setting?.get(id) ?? app.ui?.settings?.getSettingValue?.(id) ?? fallback;
}

function words() {
  return wordsOf(setting("Comfy.Locale", "en"));
}

function updatePanels() {
  for (const panel of panels.values()) panel.update();
}

function fileUrl({ filename, subfolder, type }) {
  const query = new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "output" });
  return api.apiURL(`/view?${query}`);
}

/** Whether a run belongs to the workflow on the screen; where either has no id of its own, node ids decide. */
function isOfThisWorkflow(detail) {
  const [ran, shown] = [detail.workflow, rootGraph(app)?.id];
  return !ran || !shown || ran === NO_WORKFLOW || shown === NO_WORKFLOW || ran === shown;
}

function panelOf(detail) {
  const node = nodeOfExecution(app, detail.node);
  return node && panels.get(node);
}

function remember(detail) {
  runs.set(detail.sid, detail);
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
}

function onProgress(detail) {
  if (!detail?.sid) return;
  remember(detail);
  const panel = panelOf(detail);
  if (panel && (isOfThisWorkflow(detail) || panel.detail?.sid === detail.sid)) panel.show(detail);
}

/** After a page reload or a change of the workflow: what the server and the host still know goes back to the nodes. */
async function restore() {
  for (const [node, panel] of panels) showOutput(panel, keptOutput(app, node));
  showRuns([...runs.values()]);
  try {
    const answer = await api.fetchApi("/joyavatar/sessions");
    if (!answer.ok) return;
    const sessions = await answer.json();
    for (const detail of sessions) remember(detail);
    showRuns(sessions);
  } catch (error) {
    console.warn("JoyAvatar: the list of runs could not be read", error);
  }
}

/** Of several runs of a node the last one is shown. */
function showRuns(details) {
  const last = new Map();
  for (const detail of details) if (isOfThisWorkflow(detail)) last.set(String(detail.node), detail);
  for (const detail of last.values()) {
    const panel = panelOf(detail);
    if (panel && (panel.isIdle || panel.detail.sid === detail.sid || detail.state === "running")) panel.show(detail);
  }
}

/** The `ui` output of a node: all that a cached node sends. */
function showOutput(panel, output) {
  const detail = output?.joyavatar?.[0];
  const file = output?.images?.[0];
  if (detail) panel.show(detail);
  else if (file) panel.showFile(file);
}

/** In canvas mode the host does not see a wheel over a DOM widget; with nodes made of DOM it does. */
function forwardWheel(event) {
  if (globalThis.LiteGraph?.vueNodesMode || !app.canvas?.processMouseWheel) return;
  event.preventDefault();
  app.canvas.processMouseWheel(event);
}

function chain(node, name, added) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    added.apply(this, values);
    return result;
  };
}

/** The host's own preview of the output file would show it a second time. */
function hideBuiltInPreview(node) {
  node.hideOutputImages = true;
  // The canvas renderer does not read that mark, and makes its preview in the node's background drawing.
  node.onDrawBackground = () => {};
}

function addPanel(node) {
  const panel = new Panel({
    words: words(),
    streamUrl: (sid) => api.apiURL(`/joyavatar/stream/${sid}`),
    fileUrl,
    settings: {
      autoplay: () => setting(AUTOPLAY, true),
      sound: () => setting(SOUND, false),
      strip: () => setting(STRIP, true),
    },
    retake: (span) => makeRetake(app, node, span),
    forwardWheel,
  });
  const widget = node.addDOMWidget("joyavatar_live", "joyavatar_live", panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => SMALLEST_HEIGHT,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  hideBuiltInPreview(node);
  panels.set(node, panel);
  chain(node, "onExecuted", (output) => showOutput(panel, output));
  chain(node, "onRemoved", () => {
    panel.release();
    panels.delete(node);
  });
  const least = node.computeSize();
  node.setSize([Math.max(least[0], FIRST_SIZE[0]), least[1] - SMALLEST_HEIGHT + FIRST_PREVIEW_HEIGHT]);
}

// Before `setup`: a run may go on while the page loads, and the host warns of events that nobody listens to.
api.addEventListener(EVENT, ({ detail }) => onProgress(detail));

app.registerExtension({
  name: "joyavatar.live",

  settings: [
    {
      id: AUTOPLAY,
      category: ["JoyAvatar", "Live preview", "Autoplay"],
      name: "Play the video while it is made",
      type: "boolean",
      defaultValue: true,
      tooltip: "Off: the preview waits for a click.",
    },
    {
      id: SOUND,
      category: ["JoyAvatar", "Live preview", "Sound"],
      name: "Start with sound",
      type: "boolean",
      defaultValue: false,
      tooltip: "Browsers allow sound only after a click on the page; until then the preview starts without.",
    },
    {
      id: STRIP,
      category: ["JoyAvatar", "Live preview", "Strip"],
      name: "Show the strip of blocks",
      type: "boolean",
      defaultValue: true,
      tooltip: "Blocks that are made, being made and to come; drag over it after a run to retake a span.",
      onChange: updatePanels,
    },
  ],

  setup() {
    api.addEventListener("reconnected", restore);
    restore();
  },

  nodeCreated(node) {
    if (KINDS.includes(kindOf(node))) addPanel(node);
  },

  afterConfigureGraph() {
    restore();
  },
});
