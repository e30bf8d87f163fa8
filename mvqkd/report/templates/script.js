"use strict";
// The page works without this: it sorts and filters the list, shows where the sound is, and
// moves the focus with the address.

const list = document.getElementById("list");
const body = list.tBodies[0];

const valueOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : text;
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

for (const header of list.tHead.rows[0].cells) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => {
    // Numbers from the most, words from A.
    const numeric = typeof valueOf(body.rows[0], header.cellIndex) === "number";
    const before = header.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : numeric;
    for (const other of list.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = header.cellIndex;
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    rows.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])));
    body.append(...rows.map(([, row]) => row));
  });
}

const form = document.getElementById("filter");
form.hidden = false;
const filter = () => {
  const wanted = form.elements.find.value.trim().toLowerCase();
  const set = form.elements.set.value;
  let found = 0;
  for (const row of body.rows) {
    const fits =
      (!set || row.cells[1].textContent === set) && row.textContent.toLowerCase().includes(wanted);
    row.hidden = !fits;
    found += fits;
  }
  document.getElementById("found").textContent =
    found === body.rows.length ? "" : `${found} of ${body.rows.length}`;
};
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();

for (const audio of document.querySelectorAll("audio")) {
  const article = audio.closest("article");
  const timeline = article.querySelector(".timeline");
  if (!timeline) continue;
  const seconds = Number(timeline.style.getPropertyValue("--seconds"));
  const head = document.createElement("div");
  head.className = "playhead";
  head.hidden = true;
  timeline.append(head);
  const show = () => {
    head.hidden = false;
    head.style.left = `${Math.min(100, (100 * audio.currentTime) / seconds)}%`;
  };
  const follow = () => {
    show();
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener("play", follow);
  audio.addEventListener("seeked", show);
  timeline.addEventListener("click", (event) => {
    const word = event.target.closest("button");
    if (!word) return;
    audio.currentTime = Number(word.parentElement.style.getPropertyValue("--t"));
    audio.play();
  });
}

const title = document.title;
const arrive = (moved) => {
  for (const audio of document.querySelectorAll("audio")) audio.pause();
  const page = document.querySelector(".utterance:target");
  document.title = page ? `${page.querySelector("h2").textContent} · ${title}` : title;
  // Not for all at once: a browser sets up a player for each.
  const audio = page?.querySelector("audio");
  if (audio) audio.preload = "metadata";
  if (page && moved) {
    page.focus({ preventScroll: true });
    scrollTo({ top: 0, behavior: "instant" });
  }
};
addEventListener("hashchange", () => arrive(true));
arrive(location.hash.startsWith("#u/"));
