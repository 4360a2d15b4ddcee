"use strict";
// 1. Draws the page's figures, the one nearest to the window first, the others when the browser has nothing else to do.
// 2. Sorts a table by the column whose heading is clicked, numbers as numbers.
// 3. Opens what is folded for printing.
(() => {
  const TOO_OLD = "This browser cannot unpack the figure: it takes Chrome 80, Firefox 113, Safari 16.4 or newer.";
  const waiting = new Set(document.querySelectorAll(".figure"));

  async function unpack(text) {
    if (typeof DecompressionStream === "undefined") throw new Error(TOO_OLD);
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  async function draw(box) {
    waiting.delete(box);
    const stand_in = box.querySelector(".waiting");
    const picture = document.createElement("div");
    try {
      const figure = await unpack(box.querySelector("script").textContent);
      box.append(picture);
      await Plotly.newPlot(picture, figure);
      stand_in.remove();
      box.dataset.state = "drawn";
    } catch (error) {
      picture.remove();
      stand_in.querySelector(".state").textContent = "The figure could not be drawn. " + error.message;
      box.dataset.state = "failed";
      console.error(error);
    }
  }

  function distance(box) {
    const place = box.getBoundingClientRect();
    return Math.max(place.top - innerHeight, -place.bottom, 0);
  }

  async function drawAll() {
    while (waiting.size) {
      const next = [...waiting].reduce((a, b) => (distance(b) < distance(a) ? b : a));
      if (distance(next) > 0) await new Promise((idle) => (window.requestIdleCallback || setTimeout)(idle));
      await draw(next);
    }
    document.documentElement.dataset.figures = "done";
  }

  function sort(button) {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const direction = before === null && numeric ? "descending" : before === "ascending" ? "descending" : "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    const key = (row) => (numeric ? Number(row.cells[column].dataset.value) : row.cells[column].textContent);
    const sign = direction === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      if (!numeric) return sign * key(a).localeCompare(key(b), undefined, { numeric: true });
      const [x, y] = [key(a), key(b)];
      return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y); // absent ones last
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  for (const button of document.querySelectorAll(".sortable th button")) {
    button.addEventListener("click", () => sort(button));
  }
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
  for (const state of document.querySelectorAll(".state")) state.textContent = "The figure is being drawn …";
  drawAll();
})();
