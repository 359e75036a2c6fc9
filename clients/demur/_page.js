"use strict";
(() => {
  const text = document.getElementById("text");
  const tip = document.getElementById("tip");
  const choice = document.getElementById("measure");
  const swatches = [...document.querySelectorAll("#legend .key:not(.doubtful)")];
  const cells = [...text.querySelectorAll(".t")];
  const names = [...document.querySelectorAll("#tokens thead th")].slice(1).map((th) => th.textContent);

  // Of each cell its tokens, of each token its columns: the table has the numbers.
  const tokens = cells.map(() => []);
  for (const row of document.querySelectorAll("#tokens tbody tr")) {
    tokens[row.dataset.cell].push([...row.cells].slice(1).map((cell) => cell.textContent));
  }

  function values(measure) {
    const column = names.indexOf(measure === "surprisal" ? "logprob" : measure);
    const sign = measure === "surprisal" ? -1 : 1;
    return tokens.map((rows) => Math.max(...rows.map((row) => sign * Number(row[column]))));
  }

  function shade() {
    const found = values(choice.value);
    const top = text.dataset.top ? Number(text.dataset.top) : Math.max(0, ...found);
    const last = swatches.length - 1;
    cells.forEach((cell, i) => {
      const level = top > 0 ? Math.trunc((found[i] / top) * swatches.length) : 0;
      cell.className = cell.className.replace(/\bs\d+\b/, "s" + Math.max(0, Math.min(level, last)));
    });
    swatches.forEach((swatch, i) => {
      swatch.textContent = ((top * i) / swatches.length).toFixed(4);
    });
    document.getElementById("legend-name").textContent = choice.value;
  }

  function show(cell) {
    const list = document.createElement("dl");
    names.forEach((name, column) => {
      const shown = tokens[cells.indexOf(cell)].map((row) => row[column]).join(" / ");
      if (!shown.trim()) return;
      list.append(document.createElement("dt"), document.createElement("dd"));
      list.children[list.children.length - 2].textContent = name;
      list.lastChild.textContent = shown;
    });
    tip.replaceChildren(list);
    tip.hidden = false;
    cell.setAttribute("aria-describedby", "tip");
    const at = cell.getClientRects()[0] || cell.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = at.bottom + tip.offsetHeight + 8 < window.innerHeight || at.top < tip.offsetHeight + 8;
    tip.style.left = Math.max(8, left) + window.scrollX + "px";
    tip.style.top = (below ? at.bottom + 4 : at.top - tip.offsetHeight - 4) + window.scrollY + "px";
  }

  function hide() {
    tip.hidden = true;
    text.querySelector("[aria-describedby]")?.removeAttribute("aria-describedby");
  }

  function move(from, to) {
    cells[from].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  }

  text.addEventListener("mouseover", (event) => { if (event.target.matches(".t")) { hide(); show(event.target); } });
  text.addEventListener("focusin", (event) => { if (event.target.matches(".t")) { hide(); show(event.target); } });
  text.addEventListener("focusout", hide);
  document.addEventListener("mouseover", (event) => {
    if (!text.contains(event.target) && !tip.contains(event.target)) hide();
  });
  text.addEventListener("keydown", (event) => {
    const from = cells.indexOf(document.activeElement);
    if (event.key === "Escape") return hide();
    if (from < 0) return;
    const last = cells.length - 1;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(from, Math.max(0, Math.min(to, last)));
  });
  text.addEventListener("click", (event) => {
    if (event.target.matches(".t")) move(Math.max(0, cells.findIndex((cell) => cell.tabIndex === 0)), cells.indexOf(event.target));
  });
  choice.addEventListener("change", shade);
})();
