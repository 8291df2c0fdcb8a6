// Draws every figure that is to be seen, in the colours of page.css; again when light turns dark.
const specs = JSON.parse(document.getElementById("figures").textContent);

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, faint, rule, one, two, three, four, low, middle, high] = [
    "ink", "faint", "rule", "one", "two", "three", "four", "low", "middle", "high",
  ].map((name) => style.getPropertyValue(`--${name}`).trim());
  const shades = [low, middle, high];
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelColor: faint, titleColor: faint, titleFontWeight: "normal", gridColor: rule, domainColor: rule, tickColor: rule, labelSeparation: 8 },
    legend: { labelColor: ink, titleColor: faint, titleFontWeight: "normal", orient: "top", symbolOpacity: 1, gradientLength: 120, gradientThickness: 8 },
    range: { category: [one, two, three, four], heatmap: shades, ramp: shades },
    bar: { color: one },
    line: { color: one },
    rule: { color: one },
    text: { color: ink },
  };
}

async function draw() {
  const config = theme();
  const seen = [...document.querySelectorAll(".plot")].filter((place) => place.offsetParent !== null);
  await Promise.all(seen.map((place) =>
    vegaEmbed(place, specs[place.id], { config, renderer: "svg", actions: false, tooltip: { theme: "custom" } })));
  document.body.dataset.drawn = seen.length;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelectorAll("details.run").forEach((run) => run.addEventListener("toggle", draw));
draw();
