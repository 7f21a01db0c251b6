for (const root of document.querySelectorAll(".quartet")) {
  for (const table of root.querySelectorAll("[data-table]")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const value = (row, i) => { const cell = row.cells[i]; return cell.dataset.sort ?? cell.textContent.trim(); };
    const sort = head => {
      const i = heads.indexOf(head), down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map(row => [value(row, i), row]);
      const numbers = keyed.every(([key]) => key === "" || !isNaN(key));
      keyed.sort(([a], [b]) => numbers ? a - b : a.localeCompare(b, undefined, {numeric: true}));
      if (down) keyed.reverse();
      body.append(...keyed.map(([, row]) => row));
    };
    heads.forEach(head => {
      head.addEventListener("click", () => sort(head));
      head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head); });
    });
  }
  const table = root.querySelector("tr[data-role]")?.closest("table"), search = root.querySelector("[data-search]");
  if (table && search) {
    const filters = [...root.querySelectorAll("[data-filter]")], rows = [...table.tBodies[0].rows];
    const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
    const count = root.querySelector("[data-count]");
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = words.every(word => texts.get(row).includes(word)) &&
          filters.every(filter => !filter.value || row.dataset[filter.dataset.filter] === filter.value);
        row.hidden = !fits;
        shown += fits;
      }
      count.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} rows`;
    };
    [search, ...filters].forEach(input => input.addEventListener("input", apply));
  }
  const frame = root.querySelector("[data-drawing]"), svg = frame?.querySelector("svg");
  if (svg) {
    const width = +svg.getAttribute("width"), height = +svg.getAttribute("height");
    let scale = 1;
    const zoom = (by, x = frame.clientWidth / 2, y = frame.clientHeight / 2) => {
      const next = by ? Math.min(8, Math.max(0.05, scale * by)) : Math.min(1, frame.clientWidth / width);
      const left = (frame.scrollLeft + x) * next / scale - x, top = (frame.scrollTop + y) * next / scale - y;
      scale = next;
      svg.setAttribute("width", width * scale);
      svg.setAttribute("height", height * scale);
      frame.scrollTo(left, top);
    };
    root.querySelectorAll("[data-zoom]").forEach(button =>
      button.addEventListener("click", () => zoom(+button.dataset.zoom)));
    frame.addEventListener("wheel", event => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const box = frame.getBoundingClientRect();
      zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, event.clientX - box.left, event.clientY - box.top);
    }, {passive: false});
    frame.addEventListener("pointerdown", event => {
      if (event.button) return;
      frame.setPointerCapture(event.pointerId);
      const move = e => frame.scrollBy(-e.movementX, -e.movementY);
      frame.addEventListener("pointermove", move);
      frame.addEventListener("pointerup", () => frame.removeEventListener("pointermove", move), {once: true});
    });
  }
}
