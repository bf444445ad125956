"use strict";
// Pictures of the page: thumbnails with outlines drawn over them when they come into view.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 12;
const state = { label: -1, score: 500, order: "spread", shown: PAGE };
const paths = new WeakMap();
const bitmaps = new WeakMap();

// The rings of an outline: a first point and steps to the next ones, separated by ";".
function pathOf(object) {
  let path = paths.get(object);
  if (path) return path;
  path = new Path2D();
  for (const ring of object[3].split(";")) {
    if (!ring) continue;
    const steps = ring.split(" ").map(Number);
    let x = 0, y = 0;
    for (let i = 0; i < steps.length; i += 2) {
      x += steps[i];
      y += steps[i + 1];
      if (i) path.lineTo(x, y); else path.moveTo(x, y);
    }
    path.closePath();
  }
  paths.set(object, path);
  return path;
}

function bitmapOf(image) {
  let promise = bitmaps.get(image);
  if (!promise) {
    const picture = new Image();
    picture.src = image.thumbnail;
    promise = picture.decode().then(() => picture);
    bitmaps.set(image, promise);
  }
  return promise;
}

const gridSize = (image) => {
  const scale = data.grid / Math.max(image.width, image.height);
  return [image.width * scale, image.height * scale];
};
const wanted = (object) =>
  (state.label < 0 || object[0] === state.label) && (object[1] < 0 || object[1] >= state.score);

// Colours as in all pictures of predictions: a hue for a class, a shade for each of its objects.
function coloured(objects) {
  const seen = new Map();
  return objects.filter(wanted).map((object) => {
    const count = seen.get(object[0]) || 0;
    seen.set(object[0], count + 1);
    const shades = data.shades[object[0]];
    return [object, shades[count % shades.length]];
  });
}

function nameOf(object) {
  const name = data.classes[object[0]];
  if (object[1] === -2) return `${name} (crowd)`;
  return object[1] < 0 ? name : `${name} ${Math.round(object[1] / 10)}%`;
}

// Paint one panel; `view` has the scale from the grid to the canvas and the place of the origin.
function paint(canvas, picture, image, objects, view, all) {
  const context = canvas.getContext("2d");
  const [width, height] = gridSize(image);
  const pixel = window.devicePixelRatio || 1;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.setTransform(view.scale, 0, 0, view.scale, view.x, view.y);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  const drawn = coloured(objects);
  const area = ([object]) => object[2][2] * object[2][3];
  const large = [...drawn].sort((a, b) => area(b) - area(a));
  for (const [object, color] of large) {
    const path = pathOf(object);
    context.strokeStyle = color;
    context.fillStyle = color;
    if (byId("masks").checked && object[3]) {
      context.globalAlpha = 0.4;
      context.fill(path, "evenodd");
      context.globalAlpha = 1;
      context.lineWidth = 1.5 * pixel / view.scale;
      context.stroke(path);
    }
    if (byId("boxes").checked || !object[3]) {
      context.globalAlpha = 0.85;
      context.lineWidth = 2 * pixel / view.scale;
      context.strokeRect(...object[2]);
      context.globalAlpha = 1;
    }
  }
  if (byId("labels").checked) paintNames(context, canvas, large.reverse(), view, pixel, all);
}

// Names of objects, small ones first, where there is room; all of them if asked for.
function paintNames(context, canvas, drawn, view, pixel, all) {
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.font = `${12 * pixel}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const taken = [];
  for (const [object, color] of drawn) {
    const text = nameOf(object);
    const width = context.measureText(text).width + 6 * pixel, height = 16 * pixel;
    const [x, y, w, h] = object[2].map((v) => v * view.scale);
    const left = x + view.x, top = y + view.y;
    if (left > canvas.width || top > canvas.height || left + w < 0 || top + h < 0) continue;
    const places = [[left, top - height], [left, top], [left, top + h], [left + w - width, top - height],
      [left + w - width, top + h], [left + (w - width) / 2, top + (h - height) / 2]].map(([a, b]) => [
      Math.max(0, Math.min(a, canvas.width - width)), Math.max(0, Math.min(b, canvas.height - height))]);
    const hits = ([a, b]) => taken.some(([c, d, e]) =>
      a < c + e && c < a + width && b < d + height && d < b + height);
    const place = places.find((p) => !hits(p)) || (all ? places[0] : null);
    if (!place) continue;
    taken.push([...place, width]);
    context.fillStyle = "rgb(16 18 21 / .82)";
    context.fillRect(...place, width, height);
    context.fillStyle = `color-mix(in srgb, ${color} 55%, white)`;
    context.fillText(text, place[0] + 3 * pixel, place[1] + height / 2 + pixel / 2);
  }
}

// What is shown of an image: the truth, each model, and in the large view the stages of cascades.
function panelsOf(image, stages) {
  const panels = [{ title: "Truth", objects: image.truth }];
  data.models.forEach((name, i) => {
    const own = stages && image.stages ? image.stages[i] || [] : [];
    own.forEach((objects, k) => panels.push({ title: `${name}, stage ${k + 1}`, objects }));
    panels.push({ title: name, objects: image.found[i], quality: image.quality[i] });
  });
  return panels;
}

function fit(canvas, image) {
  const pixel = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * pixel));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * pixel));
  const [width, height] = gridSize(image);
  const scale = Math.min(canvas.width / width, canvas.height / height);
  return { scale, x: (canvas.width - width * scale) / 2, y: (canvas.height - height * scale) / 2 };
}

const pending = new Map(); // canvas -> how to paint it
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) pending.get(entry.target)?.();
}, { rootMargin: "300px" });

function chosen() {
  const images = data.images.filter((image) => state.label < 0
    || image.truth.some(wanted) || image.found.some((own) => own.some(wanted)));
  const key = {
    spread: (image) => -image.spread,
    place: (image) => image.place,
  }[state.order] || ((image) => image.quality[Number(state.order)] ?? 1);
  return images.map((image) => [key(image), image]).sort((a, b) => a[0] - b[0]).map((x) => x[1]);
}

let current = [];
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function cardOf(image, index) {
  const card = element("article", "item");
  card.append(element("h3", "", image.name));
  const row = element("div", "panels");
  row.style.setProperty("--n", data.models.length + 1);
  panelsOf(image, false).forEach((panel, number) => {
    const figure = element("figure"), button = element("button", "shot"), canvas = element("canvas");
    button.type = "button";
    button.setAttribute("aria-label", `enlarge ${panel.title}, ${image.name}`);
    canvas.style.aspectRatio = `${image.width} / ${image.height}`;
    button.append(canvas);
    button.addEventListener("click", () => viewer.open(index, panel.title));
    const count = panel.objects.filter(wanted).length;
    const quality = panel.quality === null || panel.quality === undefined ? "" : ` · ${panel.quality.toFixed(2)}`;
    figure.append(button, element("figcaption", "", `${panel.title}: ${count}${quality}`));
    pending.set(canvas, () => bitmapOf(image).then((picture) => {
      paint(canvas, picture, image, panel.objects, fit(canvas, image), false);
      canvas.dataset.painted = number;
    }));
    observer.observe(canvas);
    row.append(figure);
  });
  card.append(row);
  return card;
}

function render() {
  observer.disconnect();
  pending.clear();
  current = chosen();
  const shown = current.slice(0, state.shown);
  byId("gallery").replaceChildren(...shown.map(cardOf));
  byId("count").textContent = `${shown.length} of ${current.length} images`;
  byId("more").hidden = shown.length === current.length;
}

function repaint() {
  for (const canvas of pending.keys()) {
    const box = canvas.getBoundingClientRect();
    if (box.bottom > -300 && box.top < window.innerHeight + 300) pending.get(canvas)();
  }
}

const viewer = (() => {
  const dialog = byId("viewer"), canvas = byId("viewer-canvas"), tabs = byId("viewer-panels");
  let index = 0, title = "Truth", zoom = 1, shift = [0, 0];
  const image = () => current[index];
  function draw() {
    const panels = panelsOf(image(), true);
    const panel = panels.find((p) => p.title === title) || panels[0];
    title = panel.title;
    byId("viewer-title").textContent = `${image().name}: ${title}`;
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", tab.textContent === title);
    const base = fit(canvas, image());
    const middle = [canvas.width / 2, canvas.height / 2];
    const view = { scale: base.scale * zoom,
      x: middle[0] + (base.x - middle[0]) * zoom + shift[0],
      y: middle[1] + (base.y - middle[1]) * zoom + shift[1] };
    bitmapOf(image()).then((picture) => {
      paint(canvas, picture, image(), panel.objects, view, true);
      canvas.dataset.zoom = zoom.toFixed(2);
    });
  }
  function reset() {
    zoom = 1;
    shift = [0, 0];
  }
  function show(next) {
    if (next < 0 || next >= current.length) return;
    index = next;
    reset();
    tabs.replaceChildren(...panelsOf(image(), true).map((panel) => {
      const tab = element("button", "", panel.title);
      tab.type = "button";
      tab.addEventListener("click", () => { title = panel.title; draw(); });
      return tab;
    }));
    byId("viewer-before").disabled = index === 0;
    byId("viewer-after").disabled = index === current.length - 1;
    draw();
  }
  function scaleBy(factor) {
    const next = Math.min(16, Math.max(1, zoom * factor));
    shift = next === 1 ? [0, 0] : shift.map((v) => v * next / zoom);
    zoom = next;
    draw();
  }
  function turn(step) {
    const titles = [...tabs.children].map((tab) => tab.textContent);
    title = titles[(titles.indexOf(title) + step + titles.length) % titles.length];
    draw();
  }
  function move(x, y) {
    if (zoom === 1) return;
    shift = [shift[0] + x, shift[1] + y];
    draw();
  }
  dialog.addEventListener("keydown", (event) => {
    const far = 60 * (window.devicePixelRatio || 1), zoomed = zoom > 1;
    const actions = {
      "+": () => scaleBy(1.5), "=": () => scaleBy(1.5), "-": () => scaleBy(1 / 1.5), "0": () => { reset(); draw(); },
      ArrowLeft: () => (zoomed ? move(far, 0) : turn(-1)), ArrowRight: () => (zoomed ? move(-far, 0) : turn(1)),
      ArrowUp: () => (zoomed ? move(0, far) : show(index - 1)), ArrowDown: () => (zoomed ? move(0, -far) : show(index + 1)),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    scaleBy(event.deltaY < 0 ? 1.2 : 1 / 1.2);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const pixel = window.devicePixelRatio || 1;
    if (event.buttons) move(event.movementX * pixel, event.movementY * pixel);
  });
  byId("viewer-close").addEventListener("click", () => dialog.close());
  byId("viewer-before").addEventListener("click", () => show(index - 1));
  byId("viewer-after").addEventListener("click", () => show(index + 1));
  byId("viewer-in").addEventListener("click", () => scaleBy(1.5));
  byId("viewer-out").addEventListener("click", () => scaleBy(1 / 1.5));
  byId("viewer-fit").addEventListener("click", () => { reset(); draw(); });
  window.addEventListener("resize", () => { if (dialog.open) draw(); });
  return {
    open(number, panel) {
      title = panel;
      dialog.showModal();
      show(number);
      canvas.focus();
    },
  };
})();

function update() {
  state.label = Number(byId("class").value);
  state.score = 10 * Number(byId("score").value);
  state.order = byId("order").value;
  byId("score-value").textContent = `${byId("score").value}%`;
  for (const figure of document.querySelectorAll("#curve-charts [data-label]")) {
    figure.hidden = Number(figure.dataset.label) !== state.label;
  }
}
for (const id of ["class", "score", "order"]) {
  byId(id).addEventListener("change", () => { state.shown = PAGE; update(); render(); });
}
byId("score").addEventListener("input", () => { update(); repaint(); });
for (const id of ["masks", "boxes", "labels"]) byId(id).addEventListener("change", repaint);
byId("more").addEventListener("click", () => {
  const first = state.shown;
  state.shown += PAGE;
  render();
  byId("gallery").children[first]?.querySelector("button").focus();
});
document.querySelector(".bar").addEventListener("submit", (event) => event.preventDefault());
let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(repaint, 150);
});
update();
render();
})();
