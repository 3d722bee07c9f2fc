for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const ascending = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") !== "ascending" : !numeric;
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const number = (row) => parseFloat(value(row).replaceAll(",", "").replace("\u2212", "-"));
      const compare = (a, b) => {
        const order = numeric ? number(a) - number(b) : value(a).localeCompare(value(b), undefined, { numeric: true });
        return ascending ? order : -order;
      };
      const known = [...body.rows].filter((row) => !numeric || !Number.isNaN(number(row)));
      const unknown = [...body.rows].filter((row) => !known.includes(row));
      const rows = [...known.sort(compare), ...unknown];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
for (const table of document.querySelectorAll("table.filterable")) {
  const input = document.createElement("input");
  input.className = "filter";
  input.type = "search";
  input.placeholder = "Filter by name";
  input.setAttribute("aria-label", "Filter the rows by name");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(input);
}
