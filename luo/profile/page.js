"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures-json").textContent);
  const root = document.documentElement;
  const narrow = 560;  // pixels of a figure
  const config = { displayModeBar: false, showTips: false };

  // ---- figures: "@name" is a colour of the style sheet, "@name-soft" the same let through ----

  function coloured(value, colours) {
    if (typeof value === "string" && value.startsWith("@")) {
      const soft = value.endsWith("-soft");
      const colour = colours.getPropertyValue(`--${value.slice(1, soft ? -5 : undefined)}`).trim();
      return soft ? `${colour}${Math.round(colours.getPropertyValue("--soft") * 255).toString(16)}` : colour;
    }
    if (Array.isArray(value)) return value.map((one) => coloured(one, colours));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([name, one]) => [name, name === "customdata" ? one : coloured(one, colours)]),
      );
    }
    return value;
  }

  function draw(place, width = place.clientWidth) {
    if (!width) return;  // not shown
    const figure = figures[place.dataset.figure];
    const colours = getComputedStyle(root);
    const colour = (name) => colours.getPropertyValue(`--${name}`).trim();
    const layout = coloured(structuredClone(figure.layout), colours);
    const data = coloured(figure.data, colours);
    const small = width < narrow;
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      layout[name] = {
        gridcolor: colour("grid"), zerolinecolor: colour("grid"), linecolor: colour("grid"),
        fixedrange: true, automargin: true, ...layout[name],
      };
      const axis = layout[name];
      if (axis.title) axis.title.standoff = 8;
      if (small && name.startsWith("x") && axis.ticktext?.length > 4) {
        axis.tickvals = axis.tickvals.filter((_, k) => k % 2 === 0);
        axis.ticktext = axis.ticktext.filter((_, k) => k % 2 === 0);
      }
    }
    const legend = data.filter((trace) => trace.name && trace.showlegend !== false).length > 1;
    if (figure.labels.long) layout.yaxis.ticktext = figure.labels[small ? "short" : "long"];
    if (place.dataset.level !== undefined) data[0].level = place.dataset.level;
    if (small && data[0].type === "icicle") data[0].maxdepth = 4;
    Plotly.react(place, data, {
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", traceorder: "normal" },
      hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("card") }, align: "left", namelength: -1 },
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", dragmode: false, width,
      font: { family: getComputedStyle(document.body).fontFamily, size: small ? 11 : 13, color: colour("ink") },
      ...layout,
      showlegend: legend,
      margin: { t: 26, r: 14, b: legend ? 62 : 34, l: 10, ...layout.margin },
    }, config);
    // A drawing is for the eye; its table says the same to everybody.
    place.firstElementChild?.setAttribute("aria-hidden", "true");
  }

  const places = [...document.querySelectorAll("[data-figure]")];
  const drawAll = () => places.forEach((place) => draw(place));

  // ---- what the reader chooses ----

  for (const choice of document.querySelectorAll("[data-choose]")) {
    const show = () => {
      for (const part of choice.closest("section").querySelectorAll(".part")) {
        part.hidden = part.id !== `part-${choice.value}`;
        if (!part.hidden) part.querySelectorAll("[data-figure]").forEach((place) => draw(place));
      }
    };
    choice.closest("p").hidden = false;
    choice.addEventListener("change", show);
    show();
  }
  for (const choice of document.querySelectorAll("[data-zoom]")) {
    const place = document.getElementById(`plot-${choice.dataset.zoom}`);
    const zoom = (level) => {
      place.dataset.level = level;
      choice.value = level;
      draw(place);
    };
    choice.closest("p").hidden = false;
    choice.addEventListener("change", () => zoom(choice.value));
    draw(place);
    // Without the movement that plotly makes of it.
    place.on("plotly_icicleclick", (event) => {
      if (event.nextLevel !== undefined) zoom(event.nextLevel);
      return false;
    });
  }

  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    root.dataset.theme = order[(order.indexOf(root.dataset.theme) + 1) % 3];
    document.getElementById("theme-name").textContent = root.dataset.theme;
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // ---- tables that sort ----

  const exact = (cell) => cell.dataset.ns ?? cell.dataset.value;
  function order(a, b) {
    const [x, y] = [exact(a), exact(b)];
    if (x === undefined) return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    return (x === "" ? -Infinity : Number(x)) - (y === "" ? -Infinity : Number(y));
  }
  for (const head of document.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const figure = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const now = before === null ? (figure ? "descending" : "ascending") : before === "ascending" ? "descending" : "ascending";
      const sign = now === "ascending" ? 1 : -1;
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", now);
      const body = head.closest("table").tBodies[0];
      const column = head.cellIndex;
      body.append(...[...body.rows].sort((a, b) => sign * order(a.cells[column], b.cells[column])));
    });
  }

  // ---- screens and paper ----

  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;  // the bars of a browser on a phone come and go
    width = innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
  let chosen = root.dataset.theme;
  addEventListener("beforeprint", () => {
    chosen = root.dataset.theme;
    root.dataset.theme = "light";
    for (const one of document.querySelectorAll("details")) one.open = true;
    for (const place of places) if (place.clientWidth) draw(place, 640);
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = chosen;
    drawAll();
  });

  drawAll();
})();
