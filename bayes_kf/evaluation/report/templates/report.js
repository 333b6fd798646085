// Sorts and searches tables, unfolds parts, shows parts of the data, reads a threshold. The page is complete without it.
"use strict";
(() => {
  const collator = new Intl.Collator("en", { numeric: true });
  const next = { none: "ascending", ascending: "descending", descending: "none" };

  const numberOf = (cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : NaN);
  const byNumber = (a, b, sign) => {
    const missing = Number.isNaN(a) - Number.isNaN(b); // undefined values come last in either order
    return missing || (a === b || Number.isNaN(a) ? 0 : sign * (a < b ? -1 : 1));
  };
  const byText = (a, b, sign) => (a === "") - (b === "") || sign * collator.compare(a, b);

  const sortRows = (rows, column, isNumber, sign) => {
    const key = isNumber ? numberOf : (cell) => cell.textContent.trim();
    const compare = isNumber ? byNumber : byText;
    return rows
      .map((row) => ({ row, key: key(row.cells[column]) }))
      .sort((a, b) => compare(a.key, b.key, sign)) // stable: equal rows keep their order
      .map((entry) => entry.row);
  };

  const makeSortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const bodies = [...table.tBodies].map((body) => ({
      body,
      rows: [...body.rows].filter((row) => !row.classList.contains("group")),
    }));
    const sortBy = (column) => {
      const order = next[heads[column].getAttribute("aria-sort")];
      heads.forEach((head, place) => head.setAttribute("aria-sort", place === column ? order : "none"));
      const isNumber = heads[column].dataset.kind === "number";
      const sign = order === "descending" ? -1 : 1;
      for (const { body, rows } of bodies) {
        body.append(...(order === "none" ? rows : sortRows(rows, column, isNumber, sign)));
      }
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sortBy(column));
    });
  };

  document.querySelectorAll("table.sortable").forEach(makeSortable);
  document.documentElement.classList.add("scripted");

  // A field above a long table that hides the rows without its words.
  document.querySelectorAll("table.searchable").forEach((table) => {
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "Search";
    field.setAttribute("aria-label", `Search ${table.closest("[aria-label]")?.getAttribute("aria-label") ?? "the table"}`);
    table.closest(".scroll").before(field);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const body of table.tBodies) {
        let shown = 0;
        for (const row of body.rows) {
          if (row.classList.contains("group")) continue;
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
          shown += !row.hidden;
        }
        body.hidden = shown === 0;
      }
    });
  });

  // A part of the data in the place of all.
  document.querySelectorAll(".parts").forEach((line) => {
    const [select, output] = [line.querySelector("select"), line.querySelector("output")];
    const marks = line.closest("figure").querySelectorAll("[data-part]");
    const display = (part) => marks.forEach((mark) => mark.setAttribute("display", mark.dataset.part === part ? "inline" : "none"));
    const show = () => {
      display(select.value);
      output.textContent = select.selectedOptions[0].dataset.note;
    };
    select.addEventListener("change", show);
    window.addEventListener("beforeprint", () => display("0")); // paper does not say what was picked
    window.addEventListener("afterprint", show);
    line.hidden = false;
    show(); // a reloaded page keeps the choice
  });

  // A threshold of confidence: what is answered, and how much of it is wrong.
  document.querySelectorAll(".threshold").forEach((part) => {
    const steps = JSON.parse(part.dataset.steps);
    const [input, output] = [part.querySelector("input"), part.querySelector("output")];
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const show = () => {
      const [threshold, answered, wrong] = steps[Number(input.value)];
      output.textContent = `${percent(threshold)}: ${percent(1 - answered)} of inputs get no answer, ${percent(wrong)} of the answers are wrong`;
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.max = String(steps.length - 1);
    input.value = part.dataset.start;
    input.addEventListener("input", show);
    part.hidden = false;
    show();
  });

  // A link to a part opens what is folded in it.
  const unfold = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const part = target?.closest("section")?.querySelector(":scope > details");
    if (part) part.open = true;
  };
  window.addEventListener("hashchange", unfold);
  unfold();

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((part) => { part.open = true; });
  });
  window.addEventListener("afterprint", () => {
    opened.forEach((part) => { part.open = false; });
    opened = [];
  });
})();
