// Sorts the rows of a table by the column whose name is pressed: numbers by their value, words by the alphabet, missing last.
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const isText = head.classList.contains("words"), before = head.getAttribute("aria-sort");
  const first = isText || head.dataset.better === "low" ? "ascending" : "descending";
  const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const compare = (one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column]);
    if (isText) return sign * a.textContent.localeCompare(b.textContent);
    const [x, y] = [a, b].map((cell) => "value" in cell.dataset ? Number(cell.dataset.value) : null);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  };
  body.append(...[...body.rows].sort(compare));
}));

// Shows and hides a method in the pictures and galleries of a section.
document.querySelectorAll("button[data-group]").forEach((button) => button.addEventListener("click", () => {
  const isShown = button.getAttribute("aria-pressed") === "false";
  button.setAttribute("aria-pressed", isShown);
  button.closest("section").querySelectorAll(`.picture .${button.dataset.group}, tr.${button.dataset.group}`).forEach((drawn) => {
    drawn.style.display = isShown ? "" : "none";
  });
}));

// What is folded up is printed, too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((one) => { one.open = true; });
});
addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
