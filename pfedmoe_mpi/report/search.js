"use strict";
for (const input of document.querySelectorAll("input[data-table]")) {
  const name = input.dataset.table, keys = Number(input.dataset.keys), most = Number(input.dataset.most);
  const table = document.getElementById("table-" + name);
  const rows = JSON.parse(document.getElementById("rows-" + name).textContent);
  const classes = [...table.tHead.rows[0].cells].map(cell => cell.className);
  const line = input.closest(".search"), said = line.querySelector("output");
  const fits = (row, wanted) => row.slice(0, keys).some(
    (text, n) => classes[n] ? text.toLowerCase().includes(wanted) : text === wanted);
  const show = row => {
    const shown = document.createElement("tr");
    row.forEach((text, n) => {
      const cell = shown.insertCell(), span = document.createElement("span");
      cell.className = classes[n];
      span.textContent = text;
      cell.append(span);
    });
    return shown;
  };
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    const found = wanted ? rows.filter(row => fits(row, wanted)) : rows;
    table.tBodies[0].replaceChildren(...found.slice(0, most).map(show));
    said.value = `${found.length} found` + (found.length > most ? `, ${most} shown` : "");
  });
  line.hidden = false;
}
