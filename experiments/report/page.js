"use strict";
// What is shown is what the address names: a group (#g=table/model/number), an image of it (.../run/image), a figure
// (#f=...) or a section. Whatever is chosen changes the address, and `route` shows what it names.
const lists = new Map(); // of each gallery: show a group, and the groups in the order that was chosen
const encoded = (id) => "#" + id.split("/").map(encodeURIComponent).join("/").replace("%3D", "=");
const go = (id, how = "pushState") => { history[how](null, "", encoded(id)); route(true); };
const tiles = (strip) => [...strip.querySelectorAll(".tile")];

function list(gallery) {
  const form = gallery.querySelector("form"), { category, order, group: choice } = form.elements;
  const all = [...gallery.querySelectorAll(".group")], names = new Map([...choice.options].map((one) => [one.value, one]));
  let listed = all, current = all[0];
  const change = (group) => Math.max(...[...group.querySelectorAll(".strip:not([hidden])")].map(
    (strip) => Math.abs((strip.dataset.changes ?? "").split(",")[order.value] || 0)));
  const sort = () => {
    listed = all.filter((group) => !category.value || group.dataset.category === category.value);
    if (order?.value) listed.sort((one, other) => change(other) - change(one));
    choice.replaceChildren(...listed.map((group) => names.get(group.id)));
  };
  const show = (group) => {
    if (!listed.includes(group)) { category.value = ""; sort(); }
    current = group;
    all.forEach((one) => { one.hidden = one !== group; });
    choice.value = group.id;
  };
  const choose = () => {
    for (const box of form.querySelectorAll("input")) {
      gallery.querySelectorAll(`[data-run="${box.value}"]`).forEach((strip) => { strip.hidden = !box.checked; });
    }
  };
  const beside = (group, way) => listed[(listed.indexOf(group) + way + listed.length) % listed.length];
  form.addEventListener("change", ({ target }) => {
    if (target === choice) { go(choice.value); return; }
    choose();
    sort();
    if (target.type === "checkbox") show(current);
    else go(listed[0].id);
  });
  for (const button of form.querySelectorAll("button")) {
    button.addEventListener("click", () => go(beside(current, Number(button.value)).id));
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  choose();
  show(current);
  lists.set(gallery, { show, beside });
}

// The filter: a section stays if its own name has all words of the query, or with what is in it that has them. What the
// filter unfolds it folds again.
const spaced = (name) => name.toLowerCase().replaceAll("_", " ");
const filter = document.querySelector(".filter"), { query, count } = filter.elements, unfolded = new Set();
const sections = [...document.querySelectorAll(".section")].map((section) => ({
  section, name: spaced(section.id),
  tables: [...section.querySelectorAll(".scroll.table")], figures: [...section.querySelectorAll(".plate")],
}));
const label = (item) => spaced(item.matches(".plate") ? `${item.dataset.name} ${item.querySelector("img").alt}` : item.getAttribute("aria-label"));
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function narrow() {
  const parts = spaced(query.value).split(" ").filter(Boolean);
  const fits = (text) => parts.every((part) => text.includes(part));
  const kept = { section: 0, table: 0, figure: 0 };
  unfolded.forEach((one) => { one.open = false; });
  unfolded.clear();
  for (const { section, name, tables, figures } of sections) {
    const named = fits(name), left = [...tables, ...figures].filter((item) => named || fits(`${name} ${label(item)}`));
    for (const item of [...tables, ...figures]) item.hidden = !left.includes(item);
    for (const child of section.children) {
      child.hidden = !named && !child.matches("summary") && !left.some((item) => child.contains(item));
    }
    section.hidden = !named && !left.length;
    kept.section += !section.hidden;
    kept.table += left.filter((item) => tables.includes(item)).length;
    kept.figure += left.filter((item) => figures.includes(item)).length;
    for (const item of named ? [] : left) {
      for (let outer = item.closest("details"); outer; outer = outer.parentElement.closest("details")) {
        if (!outer.open) { unfolded.add(outer); outer.open = true; }
      }
    }
  }
  const gone = new Set(sections.filter(({ section }) => section.hidden).map(({ section }) => section.id));
  for (const entry of document.querySelectorAll(".contents li")) entry.hidden = gone.has(entry.firstElementChild.hash.slice(1));
  for (const chapter of document.querySelectorAll(".contents > div")) chapter.hidden = !chapter.querySelector("li:not([hidden])");
  document.querySelector(".contents").hidden = !kept.section;
  for (const chapter of document.querySelectorAll("main > section:not(.opening)")) chapter.hidden = !chapter.querySelector(".section:not([hidden])");
  count.textContent = !parts.length ? "" : !kept.section ? "Nothing has this name."
    : `${counted(kept.section, "section")}, ${counted(kept.table, "table")}, ${counted(kept.figure, "figure")}`;
}
const clear = () => { query.value = ""; narrow(); };
const fold = (open) => document.querySelectorAll("main details").forEach((one) => { one.open = open && !one.closest("[hidden]"); });
filter.addEventListener("input", narrow);
filter.addEventListener("submit", (event) => event.preventDefault());
filter.elements.unfold.addEventListener("click", () => fold(true));
filter.elements.fold.addEventListener("click", () => fold(false));
filter.hidden = false;

// The lightbox: an image over the baseline's of the same seed, and a slider between the two.
const dialog = document.querySelector("dialog"), part = (selector) => dialog.querySelector(selector);
const pair = part(".pair"), slider = part("input"), before = new Image(), after = new Image();
pair.prepend(before, after);
let shown = null, came = false; // the link whose image is in the lightbox; whether there is a place to go back to

const split = () => {
  after.style.clipPath = slider.disabled ? "" : `inset(0 0 0 ${slider.value}%)`;
  part(".line").style.left = `${slider.value}%`;
};
// The strips of a group that have images to be compared; where there are none, those with images.
function compared(group) {
  const strips = [...group.querySelectorAll(".strip:not([hidden])")].filter((strip) => tiles(strip).length);
  const pushed = strips.filter((strip) => without(strip));
  return pushed.length ? pushed : strips;
}
const without = (strip) => {
  const base = strip.dataset.baseline && strip.parentElement.querySelector(`[data-run="${strip.dataset.baseline}"]`);
  return base && tiles(base).length ? base : null;
};
const large = (link) => link.dataset.full ?? link.querySelector("img").src;

function open(link, arrived) {
  const strip = link.closest(".strip"), group = link.closest(".group");
  const at = strip ? tiles(strip).indexOf(link) : 0, strips = strip ? compared(group) : [];
  const instead = strips.find((other) => without(other) === strip);
  if (instead) { // the image without: shown below one with the method
    const next = tiles(instead)[at] ?? tiles(instead)[0];
    history.replaceState(null, "", encoded(next.id));
    open(next, arrived);
    return;
  }
  const base = strip && without(strip), other = base && (tiles(base)[at] ?? null);
  const picture = link.querySelector("img");
  shown = link;
  after.src = large(link);
  after.alt = picture.alt;
  before.hidden = part(".line").hidden = part(".compare").hidden = slider.disabled = !other;
  if (other) { before.src = large(other); before.alt = other.querySelector("img").alt; }
  part(".compare .before").textContent = other ? base.dataset.title : "";
  part(".compare .after").textContent = strip?.dataset.title ?? "";
  part("#shown").textContent = strip
    ? `${group.dataset.prompt}, seed ${group.dataset.seed}, image ${at + 1} of ${tiles(strip).length}: ${strip.dataset.title}` : picture.alt;
  part(".scores").replaceChildren(...[...strip?.querySelectorAll(".scores > span") ?? []].map((one) => one.cloneNode(true)));
  part("[name=up]").disabled = part("[name=down]").disabled = strips.length < 2;
  split();
  if (!dialog.open) { came = arrived; dialog.showModal(); }
}

function move(along, across) {
  const strip = shown.closest(".strip");
  let next;
  if (!strip) {
    const figures = [...shown.closest(".section, .opening").querySelectorAll(".plate a")];
    next = figures[(figures.indexOf(shown) + along + figures.length) % figures.length];
  } else if (across) {
    const strips = compared(strip.closest(".group")), to = strips[(strips.indexOf(strip) + across + strips.length) % strips.length];
    next = tiles(to)[tiles(strip).indexOf(shown)] ?? tiles(to)[0];
  } else {
    next = tiles(strip)[tiles(strip).indexOf(shown) + along];
    const { beside } = lists.get(strip.closest(".gallery"));
    for (let group = strip.closest(".group"); !next;) {
      group = beside(group, along);
      const strips = compared(group), to = strips.find((one) => one.dataset.run === strip.dataset.run) ?? strips[0];
      next = to && tiles(to).at(along > 0 ? 0 : -1);
    }
  }
  go(next.id, "replaceState");
}

function zoom() {
  const native = dialog.classList.toggle("native");
  part("[name=zoom]").setAttribute("aria-pressed", native);
}

const actions = {
  left: () => move(-1, 0), right: () => move(1, 0), up: () => move(0, -1), down: () => move(0, 1), zoom, close: () => dialog.close(),
};
dialog.addEventListener("click", ({ target }) => (target === dialog ? dialog.close() : actions[target.name]?.()));
document.addEventListener("keydown", (event) => {
  if (!dialog.open) return;
  const action = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", z: "zoom", Z: "zoom" }[event.key];
  if (!action || event.target === slider || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[action]();
});
dialog.addEventListener("close", () => {
  if (!shown) return;
  const place = shown.closest(".group, .section, .opening");
  shown = null;
  if (came) history.back();
  else go(place.id || "content", "replaceState");
});
after.addEventListener("load", () => {
  pair.style.setProperty("--ratio", after.naturalWidth / after.naturalHeight);
  pair.style.setProperty("--native", `${after.naturalWidth}px`);
});
slider.addEventListener("input", split);
for (const kind of ["pointerdown", "pointermove"]) {
  pair.addEventListener(kind, (event) => {
    if (!event.buttons || slider.disabled) return;
    const box = pair.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    split();
  });
}

function route(arrived) { // arrived: from within the page, and not by an address that was sent
  let address = "";
  try { address = decodeURIComponent(location.hash.slice(1)); } catch { /* no address of this page */ }
  const target = address && document.getElementById(address);
  const image = target && target.matches(".tile, .plate a");
  if (!image && dialog.open) { shown = null; dialog.close(); }
  if (!target) return;
  if (target.closest(".section")?.hidden || target.closest(".section > [hidden]")) clear();
  for (let outer = target.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
  const group = target.closest(".group");
  if (group) lists.get(group.closest(".gallery")).show(group);
  if (image) open(target, Boolean(arrived));
  else target.scrollIntoView();
}

document.querySelectorAll(".gallery").forEach(list);
document.addEventListener("click", (event) => { // instead of scrolling to what is opened: it is to be closed again
  const link = event.target.closest(".tile, .plate a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(decodeURIComponent(link.hash.slice(1)));
});
addEventListener("hashchange", route);
addEventListener("load", () => route(false)); // after the browser went to the address itself, and moved the focus there
