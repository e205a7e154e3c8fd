// Runs once, with `element` around the results; what is inside is replaced with every state.
const find = (selector) => element.querySelector(selector);

function compare(row, image) {
  const picture = (r) => find(`.nt-pair[data-row="${r}"][data-image="${image}"] img`);
  const after = picture(row);
  if (row === "0" || !after || !picture("0")) return;
  find(".nt-before").src = picture("0").src;
  find(".nt-after").src = after.src;
  find(".nt-which").textContent = after.alt.replace(/: compare$/, "");
  find(".nt-save").href = after.src;
  find(".nt-save").download = `negtome-${Number(image) + 1}.png`;
  find(".nt-slider").hidden = false;
  element.querySelectorAll(".nt-pair").forEach((pair) =>
    pair.setAttribute("aria-pressed", String(pair.dataset.image === image && [row, "0"].includes(pair.dataset.row))));
  find(".nt-slider").scrollIntoView({ block: "nearest" });
}

element.addEventListener("click", async (event) => {
  const pair = event.target.closest(".nt-pair");
  if (pair) {
    const other = find(`.nt-pair:not([data-row="0"])[data-image="${pair.dataset.image}"]`);
    compare(pair.dataset.row === "0" && other ? other.dataset.row : pair.dataset.row, pair.dataset.image);
  }
  const copy = event.target.closest(".nt-copy");
  if (copy) {
    await navigator.clipboard.writeText(copy.nextElementSibling.textContent);
    copy.textContent = "Copied";
  }
});

element.addEventListener("input", (event) => {
  if (event.target.matches(".nt-slider input")) find(".nt-frame").style.setProperty("--cut", `${event.target.value}%`);
});
