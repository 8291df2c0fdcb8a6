// Draw every visible figure in the colours of page.css, and redraw when the theme changes or a run is unfolded.
const specs = JSON.parse(document.getElementById("figures").textContent);

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colours = (name) => style.getPropertyValue(name).split(",").map((colour) => colour.trim());
  const [ink, faint, rule] = ["--ink", "--faint", "--rule"].map((name) => colours(name)[0]);
  const series = colours("--series");
  const shades = colours("--shades");
  const plain = { titleColor: faint, titleFontWeight: "normal" };
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...plain, labelColor: faint, gridColor: rule, domainColor: rule, tickColor: rule, labelSeparation: 8 },
    legend: { ...plain, labelColor: ink, orient: "top", columns: 2, symbolOpacity: 1, gradientLength: 120, gradientThickness: 8 },
    range: { category: series, heatmap: shades, ramp: shades },
    mark: { color: series[0] },
    text: { color: ink },
  };
}

async function draw() {
  const config = theme();
  const visible = [...document.querySelectorAll(".plot")].filter((place) => !place.closest("details:not([open])"));
  await Promise.all(visible.map((place) =>
    vegaEmbed(place, specs[place.id], { config, renderer: "svg", actions: false, tooltip: { theme: "custom" } })));
  document.body.dataset.drawn = visible.length;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelectorAll("details.run").forEach((run) => run.addEventListener("toggle", draw));
draw();
