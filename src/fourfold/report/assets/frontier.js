"use strict";
// Draws the frontier that is embedded in the page. It computes no figure.
(function () {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = ["#0072b2", "#c2500a", "#00795a", "#a8508a", "#7a6a00", "#4a5563"];
  const DARK = ["#56b4e9", "#f0a35e", "#3fcf9f", "#e39ccb", "#e6d94f", "#b4c0ce"];
  const chart = echarts.init(document.getElementById("frontier"), null, { renderer: "svg" });

  // zeros of a small number would not fit beside the axis
  const short = (value) => (value < 0.001 ? value.toExponential(0) : String(value));

  function tip(index) {
    const point = data.points[index];
    const box = document.createElement("div");
    const lines = [
      point.bits.toFixed(3) + " bits a weight" + (index === data.chosen ? " (chosen)" : ""),
      point.size + " in all",
      "predicted KL " + point.kl.toPrecision(3),
      ...Object.entries(point.groups).map(([form, count]) => form + ": " + count + " groups"),
    ];
    for (const line of lines) {
      const row = document.createElement("div");
      row.textContent = line;
      box.append(row);
    }
    return box;
  }

  function draw() {
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink").trim();
    const soft = css.getPropertyValue("--soft").trim();
    const line = css.getPropertyValue("--line").trim();
    const panel = css.getPropertyValue("--panel").trim();
    const colours = dark.matches ? DARK : LIGHT;
    const bits = data.points.map((p) => p.bits);
    const range = { min: Math.floor(bits[0]), max: Math.ceil(bits[bits.length - 1]) };
    const label = { color: soft, fontSize: 12 };
    const title = { nameLocation: "middle", nameTextStyle: { color: soft, fontSize: 13 }, axisLabel: label };
    const lines = { axisLine: { onZero: false, lineStyle: { color: line } }, splitLine: { lineStyle: { color: line } } };
    // a logarithmic axis has no place for the zero of a model that is kept whole
    const shown = data.points.map((p, i) => [p.bits, p.kl, i]).filter((p) => p[1] > 0);
    const chosen = shown.filter((p) => p[2] === data.chosen);
    chart.setOption(
      {
        animation: false,
        textStyle: { fontFamily: getComputedStyle(document.body).fontFamily },
        legend: { top: 0, textStyle: { color: ink, fontSize: 13 }, data: ["frontier", "chosen", ...data.formats] },
        grid: [
          { left: 78, right: 20, top: 64, height: 250, outerBoundsMode: "none" },
          { left: 78, right: 20, top: 372, height: 130, outerBoundsMode: "none" },
        ],
        tooltip: { trigger: "item", confine: true, backgroundColor: panel, borderColor: line, textStyle: { color: ink, fontSize: 13 } },
        xAxis: [0, 1].map((grid) =>
          Object.assign({ gridIndex: grid, type: "value", name: grid ? "bits a weight" : "", nameGap: 30 }, range, title, lines),
        ),
        yAxis: [
          Object.assign({ gridIndex: 0, type: "log", name: "predicted KL (nats a token)", nameGap: 58 }, title, lines, { axisLabel: { ...label, formatter: short } }),
          Object.assign({ gridIndex: 1, type: "value", name: "groups", nameGap: 40, minInterval: 1 }, title, lines),
        ],
        series: [
          { name: "frontier", type: "line", data: shown, symbol: "circle", symbolSize: 8, color: soft, tooltip: { formatter: (at) => tip(at.data[2]) } },
          { name: "chosen", type: "scatter", data: chosen, symbol: "diamond", symbolSize: 20, color: ink, z: 5, tooltip: { formatter: (at) => tip(at.data[2]) } },
          ...data.formats.map((form, index) => ({
            name: form,
            type: "line",
            stack: "groups",
            areaStyle: { opacity: 0.75 },
            lineStyle: { width: 0 },
            symbol: "none",
            xAxisIndex: 1,
            yAxisIndex: 1,
            color: colours[index % colours.length],
            data: data.points.map((p) => [p.bits, p.groups[form] || 0]),
          })),
        ],
      },
      true,
    );
  }

  draw();
  dark.addEventListener("change", draw);
  window.addEventListener("resize", () => chart.resize());
})();
