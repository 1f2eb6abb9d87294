"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // Hover: the titles of marks become one quick tooltip; a plot keeps its name as a label.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  for (const plot of all("svg.plot")) {
    const name = plot.querySelector(":scope > title");
    const text = plot.querySelector(":scope > desc");
    plot.setAttribute("aria-label", `${name.textContent}. ${text.textContent}`);
    name.remove();
    for (const title of all("title", plot)) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    }
  }
  const follow = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const { width, height } = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - width - 8);
    const y = event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18;
    tip.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
  };
  addEventListener("pointermove", follow, { passive: true });
  addEventListener("pointerdown", follow, { passive: true });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

  // Copy a command; where the clipboard is closed, select it.
  addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const code = button.parentNode.querySelector("code");
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy") ? "Copied" : "Selected";
    }
    button.textContent = done;
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  // Sort a table by a column.
  for (const table of all("table")) {
    const body = table.tBodies[0];
    if (body.rows.length < 3) continue;
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => {
          const cell = row.cells[column];
          return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
        };
        const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
        const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
        body.append(...rows);
      });
    });
  }

  // Galleries: a step of cards at a time; filter and sort where there are controls.
  for (const gallery of all(".gallery")) {
    const list = gallery.querySelector(".cards");
    const cards = [...list.children];
    const form = gallery.querySelector("form");
    const status = gallery.querySelector(".matches");
    const more = gallery.querySelector(".more");
    const key = (card) => card.querySelector(".key").textContent;
    const number = (name) => (a, b) => Number(a.dataset[name]) - Number(b.dataset[name]);
    const orders = {
      score: number("m"),
      p: number("p"),
      "p-down": (a, b) => number("p")(b, a),
      key: (a, b) => key(a).localeCompare(key(b)),
    };
    const STEP = form ? 48 : 12;
    let limit = STEP;
    let found = cards;
    const show = () => {
      if (form) {
        const { label, suggestion, text, sort } = form.elements;
        const words = text.value.toLowerCase().trim();
        found = cards.filter((card) =>
          (!label.value || card.dataset.l === label.value) &&
          (!suggestion.value || card.dataset.s === suggestion.value) &&
          (!words || card.textContent.toLowerCase().includes(words)));
        found.sort(orders[sort.value]);
      }
      const shown = new Set(found.slice(0, limit));
      for (const card of cards) card.hidden = !shown.has(card);
      if (form) list.append(...found);
      more.hidden = found.length <= limit;
      more.firstElementChild.textContent = `Show ${Math.min(STEP, found.length - limit)} more of ${found.length}`;
      if (status) status.textContent = `${found.length} of ${cards.length} match`;
    };
    const restart = () => { limit = STEP; show(); };
    if (form) {
      form.addEventListener("input", restart);
      form.addEventListener("reset", () => setTimeout(restart));
      form.addEventListener("submit", (event) => event.preventDefault());
    }
    more.firstElementChild.addEventListener("click", () => {
      const first = found[limit];
      limit += STEP;
      show();
      first.tabIndex = -1;
      first.focus({ preventScroll: true });
    });
    show();
  }

  // Texts of coloured tokens: what they are coloured by, and their numbers under the mouse or by the arrow keys.
  for (const part of all(".token-texts")) {
    const LEVELS = 8;
    const readout = part.querySelector(".readout");
    const label = part.querySelector(".scale-label");
    const form = part.querySelector("form");
    const tokens = all(".tokens span", part);
    for (const token of tokens) {
      token.dataset.tip = token.title;
      token.removeAttribute("title");
    }
    const level = (value, strongest) => {
      if (!(value < strongest)) return value > 0 ? LEVELS : 0;
      return strongest > 0 ? Math.floor((Math.max(value, 0) / strongest) * (LEVELS + 1)) : 0;
    };
    form.addEventListener("input", () => {
      const chosen = form.elements.scale.value;
      const { strongest, label: words } = form.querySelector(`[value="${chosen}"]`).dataset;
      label.textContent = words;
      for (const token of tokens) {
        if (!("v" in token.dataset)) continue;
        const value = token.dataset.v.split(",")[chosen];
        token.className = value === "" ? "" : `k${level(Number(value), Number(strongest))}`;
      }
      if (here) here.classList.add("here");
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    let here = null;
    const choose = (token) => {
      if (here) here.classList.remove("here");
      here = token;
      here.classList.add("here");
      readout.textContent = `“${here.textContent}”: ${here.dataset.tip}`;
    };
    const STEPS = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 };
    for (const text of all(".tokens", part)) {
      const own = [...text.children];
      text.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
        const now = own.indexOf(here);
        const wanted = { Home: 0, End: own.length - 1 }[event.key] ?? now + STEPS[event.key];
        if (Number.isNaN(wanted)) return;
        event.preventDefault();
        choose(own[now < 0 && event.key !== "End" ? 0 : Math.min(own.length - 1, Math.max(0, wanted))]);
      });
      text.addEventListener("click", (event) => {
        if (event.target !== text) choose(event.target);
      });
    }
  }

  // The section that is being read, in the navigation.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) seen.observe(document.getElementById(id));

  // On paper nothing can be opened.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
