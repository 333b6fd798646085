// Sorts a table when its heading is pressed: ascending, descending, original order. The page is complete without it.
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
