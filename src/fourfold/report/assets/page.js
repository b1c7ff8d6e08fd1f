"use strict";
// Draws what the embedded data holds and what the selects ask for. It computes no figure.
(function () {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const redraws = [];
  const byId = (id) => document.getElementById(id);
  document.documentElement.classList.add("scripted");

  // Okabe-Ito colours: told apart with any colour vision; shapes and dashes repeat the difference.
  const LIGHT = ["#4a5563", "#0072b2", "#c2500a", "#00795a", "#a8508a", "#7a6a00"];
  const DARK = ["#b4c0ce", "#56b4e9", "#f0a35e", "#3fcf9f", "#e39ccb", "#e6d94f"];
  const SHAPES = ["rect", "circle", "triangle", "diamond", "pin", "arrow"];
  const DASHES = ["dashed", "solid", "solid", "solid", "solid", "solid"];

  function style(index) {
    const colours = dark.matches ? DARK : LIGHT;
    const place = data.subjects[0].base ? index : index + 1;
    const turn = Math.floor(place / colours.length); // a colour that comes again has another shape
    return {
      color: colours[place % colours.length],
      symbol: SHAPES[(place + turn) % SHAPES.length],
      dash: DASHES[place % DASHES.length],
    };
  }

  function theme() {
    const css = getComputedStyle(document.documentElement);
    const value = (name) => css.getPropertyValue(name).trim();
    return { ink: value("--ink"), soft: value("--soft"), line: value("--line"), panel: value("--panel") };
  }

  function digits(value, count = 3) {
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(value)));
    const places = Math.min(8, Math.max(0, count - 1 - size));
    return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  }

  function fill(select, options) {
    const kept = select.value;
    select.replaceChildren(
      ...options.map(([value, text]) => {
        const option = document.createElement("option");
        option.value = value;
        option.textContent = text;
        return option;
      }),
    );
    if (options.some(([value]) => String(value) === kept)) select.value = kept;
  }

  // Tooltips are built as elements with text, never as markup: names come from outside.
  function tip(title, lines) {
    const box = document.createElement("div");
    const head = document.createElement("b");
    head.textContent = title;
    box.append(head);
    for (const line of lines) {
      const row = document.createElement("div");
      row.textContent = line;
      box.append(row);
    }
    return box;
  }

  function axis(name, extra) {
    const t = theme();
    return Object.assign(
      {
        name,
        nameLocation: "middle",
        nameTextStyle: { color: t.soft, fontSize: 13 },
        axisLabel: { color: t.soft, fontSize: 12 },
        axisLine: { onZero: false, lineStyle: { color: t.line } },
        splitLine: { lineStyle: { color: t.line } },
      },
      extra,
    );
  }

  function options(chart, series, x, y, formatter) {
    const t = theme();
    const names = legendOf(series);
    const narrow = chart.getWidth() < 560;
    const legend = { left: narrow ? 0 : "center", orient: narrow ? "vertical" : "horizontal" };
    if (series.every((s) => s.type === "scatter")) legend.itemWidth = 14; // as wide as high: shapes keep theirs
    return {
      animation: false,
      textStyle: { fontFamily: getComputedStyle(document.body).fontFamily },
      legend: Object.assign(legend, { top: 0, textStyle: { color: t.ink, fontSize: 13 }, data: names }),
      grid: { left: narrow ? 58 : 70, right: 20, top: narrow ? 24 + 24 * names.length : 44, bottom: 56 },
      tooltip: {
        trigger: "item",
        confine: true,
        backgroundColor: t.panel,
        borderColor: t.line,
        textStyle: { color: t.ink, fontSize: 13 },
        formatter,
      },
      xAxis: x,
      yAxis: y,
      series,
    };
  }

  function legendOf(series) {
    return [...new Set(series.filter((s) => !s.quiet).map((s) => s.name))];
  }

  function show(chart, option) {
    chart.setOption(option, true);
  }

  function start(id, draw, selects) {
    const chart = echarts.init(byId(id), null, { renderer: "svg" });
    const redraw = () => draw(chart);
    for (const select of selects) byId(select).addEventListener("change", redraw);
    redraws.push(redraw);
    new ResizeObserver(() => {
      chart.resize();
      redraw();
    }).observe(byId(id));
    redraw();
  }

  // ---- speed over load
  function chosenColumn() {
    const metric = byId("load-metric").value;
    const own = data.columns.filter((c) => c.metric === metric);
    fill(byId("load-statistic"), own.map((c) => [c.statistic, c.statistic]));
    byId("load-statistic-label").hidden = own.length < 2;
    byId("load-statistic-label").style.display = own.length < 2 ? "none" : "";
    return own.find((c) => c.statistic === byId("load-statistic").value) || own[0];
  }

  function drawLoad(chart) {
    const column = chosenColumn();
    const profile = Number(byId("load-profile").value);
    const interactive = byId("load-x").value === "interactivity";
    const here = data.load.filter((p) => p.profile === profile);
    const users = [...new Set(here.map((p) => p.concurrency))].sort((a, b) => a - b).map(String);
    const series = data.subjects.map((subject, index) => {
      const look = style(index);
      const points = here.filter((p) => p.subject === index && p.values && column.key in p.values);
      return {
        type: "line",
        name: subject.label,
        symbol: look.symbol,
        symbolSize: 11,
        itemStyle: { color: look.color },
        lineStyle: { color: look.color, width: 2.5, type: look.dash },
        label: { show: interactive, position: "top", color: look.color, formatter: (i) => String(i.data.point.concurrency) },
        data: points
          .filter((p) => !interactive || "user_speed_tok_s_p50" in p.values)
          .map((p) => ({
            value: [interactive ? p.values.user_speed_tok_s_p50 : String(p.concurrency), p.values[column.key]],
            point: p,
          })),
      };
    });
    if (!interactive) {
      const excluded = here.filter((p) => "excluded" in p);
      series.push({
        type: "scatter",
        name: "excluded",
        quiet: excluded.length === 0,
        symbol: "path://M1 0 L5 4 L9 0 L10 1 L6 5 L10 9 L9 10 L5 6 L1 10 L0 9 L4 5 L0 1 Z",
        symbolSize: 13,
        itemStyle: { color: theme().soft },
        data: excluded.map((p) => ({ value: [String(p.concurrency), 0], point: p })),
      });
    }
    const unit = column.unit;
    const title = column.title + (column.statistic ? ", " + column.statistic : "");
    const x = interactive
      ? axis("speed per user, p50 (tok/s/user)", { type: "value", nameGap: 32, min: 0 })
      : axis("users at a time", { type: "category", data: users, nameGap: 32, boundaryGap: true });
    const y = axis(unit, { type: "value", nameGap: 54, min: 0 });
    show(
      chart,
      options(chart, series, x, y, (item) => {
        const p = item.data.point;
        const name = data.subjects[p.subject].label;
        if ("excluded" in p) return tip(name, [p.concurrency + " users: excluded", digits(100 * p.excluded) + " % errors"]);
        const lines = [title + ": " + digits(p.values[column.key], 4) + " " + unit];
        lines.push(p.concurrency + (p.concurrency === 1 ? " user" : " users"));
        if (interactive) lines.push("speed per user: " + digits(p.values.user_speed_tok_s_p50, 4) + " tok/s");
        if (p.runs > 1) lines.push("median of " + p.runs + " runs");
        return tip(name, lines);
      }),
    );
    const dropped = here.filter((p) => "excluded" in p);
    byId("load-caption").textContent =
      title + " in " + unit + ", " + column.better + " is better. " +
      (interactive ? "The figure at each point is the number of users; further right is faster for each of them. " : "") +
      (dropped.length
        ? "Excluded for errors: " +
          dropped.map((p) => data.subjects[p.subject].label + " at " + p.concurrency + " users").join("; ") + "."
        : "");
  }

  // ---- spread within one load
  function drawCurves(chart) {
    const profile = Number(byId("curve-profile").value);
    const here = data.curves.filter((c) => c.profile === profile);
    const users = [...new Set(here.map((c) => c.concurrency))].sort((a, b) => a - b);
    fill(byId("curve-concurrency"), users.map((u) => [u, u]));
    const concurrency = Number(byId("curve-concurrency").value);
    const metric = byId("curve-metric").value;
    const column = data.columns.find((c) => c.metric === metric);
    const series = here
      .filter((c) => c.concurrency === concurrency && c.metrics[metric])
      .map((c) => {
        const look = style(c.subject);
        return {
          type: "line",
          name: data.subjects[c.subject].label,
          symbol: look.symbol,
          symbolSize: 8,
          showSymbol: false,
          itemStyle: { color: look.color },
          lineStyle: { color: look.color, width: 2.5, type: look.dash },
          data: c.metrics[metric].map((value, percent) => [value, percent]),
        };
      });
    const x = axis(column.title + " (" + column.unit + ")", { type: "value", nameGap: 32, min: 0 });
    const y = axis("% at or below", { type: "value", nameGap: 44, min: 0, max: 100 });
    const formatter = (items) =>
      tip(column.title, items.map((i) => i.seriesName + ": " + i.value[1] + " % at or below " + digits(i.value[0]) + " " + column.unit));
    const option = options(chart, series, x, y, formatter);
    option.tooltip.trigger = "axis";
    show(chart, option);
    const what = metric === "itl_ms" ? "gaps between tokens" : "requests";
    byId("curve-caption").textContent =
      "Height is the share of " + what + " at or below the value: " +
      (column.better === "lower" ? "further left is better, and steeper is steadier." : "further right is better, and steeper is steadier.");
  }

  // ---- quality with intervals
  function drawQuality(chart) {
    const quality = data.quality;
    const metric = quality.metrics.find((m) => m.key === byId("quality-metric").value);
    const scale = metric.unit === "%" ? 100 : 1;
    const rows = quality.rows.filter((r) => r.metric === metric.key);
    const texts = [...quality.texts].reverse();
    const subjects = [...new Set(rows.map((r) => r.subject))];
    const offset = (subject) => ((subjects.length - 1) / 2 - subjects.indexOf(subject)) * Math.min(0.24, 0.6 / subjects.length);
    const series = [];
    for (const subject of subjects) {
      const look = style(subject);
      const own = rows.filter((r) => r.subject === subject);
      const height = (row) => texts.indexOf(row.text) + offset(subject);
      series.push({
        type: "scatter", name: data.subjects[subject].label, symbol: look.symbol, symbolSize: 12, z: 3,
        itemStyle: { color: look.color },
        data: own.map((row) => ({ value: [row.value * scale, height(row)], row })),
      });
      for (const row of own) {
        series.push({
          type: "line", quiet: true, name: data.subjects[subject].label, silent: true, symbol: "none",
          itemStyle: { color: look.color }, lineStyle: { color: look.color, width: 3, opacity: 0.55, type: "solid" },
          data: [[row.low * scale, height(row)], [row.high * scale, height(row)]],
        });
      }
    }
    if (metric.key === "perplexity_ratio" || metric.key === "kl_divergence") {
      const same = metric.key === "kl_divergence" ? 0 : 1;
      series.push({
        type: "line", quiet: true, name: "equal to the base", silent: true, symbol: "none",
        lineStyle: { color: theme().soft, width: 1, type: "dotted" }, itemStyle: { color: theme().soft },
        data: [[same, -0.6], [same, texts.length - 0.4]],
      });
    }
    const x = axis(metric.title + (metric.unit && metric.unit !== "×" ? " (" + metric.unit + ")" : ""), { type: "value", nameGap: 32, scale: true });
    const y = axis("", {
      type: "value", min: -0.6, max: texts.length - 0.4, interval: 1, splitLine: { show: false }, axisTick: { show: false },
      axisLabel: { show: false },
    });
    const option = options(chart, series, x, y, (item) => {
      const row = item.data.row;
      return tip(data.subjects[row.subject].label, [
        row.text,
        metric.title + ": " + digits(row.value * scale, 4) + " " + metric.unit,
        "95 % interval: " + digits(row.low * scale, 4) + " to " + digits(row.high * scale, 4),
      ]);
    });
    const narrow = chart.getWidth() < 560;
    const room = Math.min(narrow ? 110 : 190, 24 + 7.5 * Math.max(...texts.map((text) => text.length)));
    option.grid.left = room;
    option.legend.itemWidth = option.legend.itemHeight = 12;
    option.yAxis.axisLabel = { show: false };
    // labels at whole heights, whatever ticks the axis would choose
    option.series.push({
      type: "scatter", quiet: true, name: "texts", silent: true, symbolSize: 1, itemStyle: { color: "transparent" },
      data: [],
      markPoint: {
        silent: true, symbol: "rect", symbolSize: 0.1, itemStyle: { color: "transparent" },
        label: { show: true, position: "left", distance: 8, color: theme().ink, fontSize: 13, width: room - 16, overflow: "truncate", formatter: (p) => p.data.text },
        data: texts.map((text, i) => ({ text, x: room, yAxis: i, coord: undefined })),
      },
    });
    show(chart, option);
    byId("quality-caption").textContent = metric.definition + " Bars are 95 % intervals; " + metric.better + " is better." +
      (series.some((s) => s.name === "equal to the base") ? " The dotted line is the base itself." : "");
  }

  // ---- errors by layer
  function drawLayers(chart) {
    const view = data.layers.find((v) => v.key === byId("layers-view").value);
    const bars = view.key === "kl_divergence";
    const weights = view.key.startsWith("sqnr_db");
    const count = 1 + Math.max(...view.series.flatMap((s) => s.points.map((p) => p[0])));
    const series = view.series.map((line) => {
      const look = style(line.style);
      const points = line.points.map(([layer, value]) => [String(layer), value]);
      const common = { name: line.name, itemStyle: { color: look.color }, data: points };
      if (bars) return Object.assign(common, { type: "bar", barMaxWidth: 22 });
      if (weights) return Object.assign(common, { type: "scatter", symbol: look.symbol, symbolSize: 8 });
      return Object.assign(common, {
        type: "line", symbol: look.symbol, symbolSize: 7, lineStyle: { color: look.color, width: 2.5, type: look.dash },
      });
    });
    const layers = Array.from({ length: count }, (_, i) => String(i));
    const x = axis("decoder layer", { type: "category", data: layers, nameGap: 32 });
    const y = axis(view.unit, { type: "value", nameGap: 54, scale: weights });
    show(
      chart,
      options(chart, series, x, y, (item) =>
        tip(item.seriesName, ["layer " + item.value[0], view.title + ": " + digits(item.value[1], 4) + " " + view.unit]),
      ),
    );
    byId("layers-caption").textContent = view.definition;
  }

  if (byId("load-box")) {
    const metrics = [...new Map(data.columns.map((c) => [c.metric, c.title])).entries()];
    fill(byId("load-profile"), data.profiles.map((title, i) => [i, title]));
    fill(byId("load-metric"), metrics);
    start("load-chart", drawLoad, ["load-profile", "load-metric", "load-statistic", "load-x"]);
    const curved = new Set(data.curves.flatMap((c) => Object.keys(c.metrics)));
    if (curved.size) {
      const first = ["itl_ms", ...metrics.map(([m]) => m)].filter((m, i, all) => curved.has(m) && all.indexOf(m) === i);
      const profiles = [...new Set(data.curves.map((c) => c.profile))].sort((a, b) => a - b);
      fill(byId("curve-profile"), profiles.map((i) => [i, data.profiles[i]]));
      fill(byId("curve-metric"), first.map((m) => [m, new Map(metrics).get(m)]));
      start("curve-chart", drawCurves, ["curve-profile", "curve-concurrency", "curve-metric"]);
    } else {
      byId("curve-box").remove();
    }
  }
  if (byId("quality-box")) {
    fill(byId("quality-metric"), data.quality.metrics.map((m) => [m.key, m.title]));
    byId("quality-chart").style.height = Math.max(260, 120 + 64 * data.quality.texts.length) + "px";
    start("quality-chart", drawQuality, ["quality-metric"]);
  }
  if (byId("layers-box")) {
    fill(byId("layers-view"), data.layers.map((v) => [v.key, v.title]));
    start("layers-chart", drawLayers, ["layers-view"]);
  }
  dark.addEventListener("change", () => redraws.forEach((redraw) => redraw()));
})();
