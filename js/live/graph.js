// Finding nodes by the ids that the server uses, and adding a Retake node. `app` is the host's, passed in.

const SUBGRAPH_INPUT = "-10";

export function rootGraph(app) {
  return app.rootGraph ?? app.graph;
}

/** The node of an execution id: "12", or "5:7" for node 7 in the subgraph of node 5. */
export function nodeOfExecution(app, id) {
  const path = String(id).split(":");
  let graph = rootGraph(app);
  for (const part of path.slice(0, -1)) graph = nodeOf(graph, part)?.subgraph;
  return nodeOf(graph, path.at(-1));
}

function nodeOf(graph, id) {
  // Ids are numbers in older hosts and strings in newer ones.
  return graph?.nodes?.find((node) => String(node.id) === String(id));
}

/** What the host keeps of a node's last `ui` output, also after a change of the workflow tab; or undefined. */
export function keptOutput(app, node) {
  const root = rootGraph(app);
  const isInner = node.graph && node.graph !== root && String(node.graph.id) !== String(root?.id);
  return app.nodeOutputs?.[isInner ? `${node.graph.id}:${node.id}` : String(node.id)];
}

/**
 * Sets the Retake node behind `node` to a span, and adds one if there is none.
 *
 * Returns {node, isNew}, or null where the host does not know the Retake node.
 */
export function makeRetake(app, node, { start, end }) {
  const graph = node.graph;
  const found = retakeOf(node);
  graph.beforeChange?.(node);
  try {
    const retake = found ?? addRetake(node);
    if (!retake) return null;
    setWidget(app, retake, "start", start);
    setWidget(app, retake, "end", end);
    app.canvas?.selectNode?.(retake);
    return { node: retake, isNew: !found };
  } finally {
    graph.afterChange?.(node);
    graph.setDirtyCanvas?.(true, true);
  }
}

function retakeOf(node) {
  const slot = outputOf(node, "video");
  for (const id of node.outputs?.[slot]?.links ?? []) {
    const target = nodeOf(node.graph, linkOf(node.graph, id)?.target_id);
    if (target && kindOf(target) === "JoyAvatarRetake") return target;
  }
  return undefined;
}

function addRetake(node) {
  const retake = globalThis.LiteGraph.createNode("JoyAvatarRetake");
  if (!retake) return null;
  retake.pos = freePlace(node, retake);
  node.graph.add(retake);
  node.connect(outputOf(node, "video"), retake, inputOf(retake, "video"));
  connectFrames(node, retake);
  return retake;
}

/** Gives `retake` the same source of frames as `node`. */
function connectFrames(node, retake) {
  const graph = node.graph;
  const link = linkOf(graph, node.inputs?.[inputOf(node, "frames")]?.link);
  const slot = inputOf(retake, "frames");
  if (!link || slot < 0) return;
  if (String(link.origin_id) === SUBGRAPH_INPUT) {
    graph.inputNode?.slots?.[link.origin_slot]?.connect(retake.inputs[slot], retake);
    return;
  }
  nodeOf(graph, link.origin_id)?.connect(link.origin_slot, retake, slot);
}

/** To the right of `node`, below what is already there. */
function freePlace(node, added) {
  const gap = 60;
  const title = 30;
  const left = node.pos[0] + node.size[0] + gap;
  let top = node.pos[1];
  const inTheWay = (other) =>
    other !== node &&
    other.pos[0] < left + added.size[0] &&
    left < other.pos[0] + other.size[0] &&
    other.pos[1] - title < top + added.size[1] &&
    top - title < other.pos[1] + other.size[1];
  for (let other = node.graph.nodes.find(inTheWay); other; other = node.graph.nodes.find(inTheWay)) {
    top = other.pos[1] + other.size[1] + title + gap / 2;
  }
  return [left, top];
}

function setWidget(app, node, name, value) {
  const widget = node.widgets?.find((candidate) => candidate.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

function linkOf(graph, id) {
  if (id === null || id === undefined) return undefined;
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

function inputOf(node, name) {
  return node.inputs?.findIndex((slot) => slot.name === name) ?? -1;
}

function outputOf(node, name) {
  return Math.max(0, node.outputs?.findIndex((slot) => slot.name === name) ?? 0);
}

export function kindOf(node) {
  return node.comfyClass ?? node.constructor?.comfyClass ?? node.type;
}
