"""The frame of report.html: no script, no outside file, light and dark by the reader's setting."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --faint: #5b6470; --rule: #d5dae1;
  --accent: #0072b2;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1d2126; --ink: #e8ebef; --faint: #a3acb8; --rule: #363c45;
    --accent: #6db9ee;
    --c0: #57aee9; --c1: #f28a4a; --c2: #35c79c; --c3: #e3a0c6; --c4: #f0b840; --c5: #8fd2f6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, section, footer { max-width: 68rem; margin: 0 auto 1.5rem; }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 1.4rem 1.6rem;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .7rem; }
p { margin: 0 0 1rem; }
.facts { color: var(--faint); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .9rem; }
.tile {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: .9rem 1.1rem;
}
.tile .name, .tile .note { color: var(--faint); font-size: .84rem; }
.tile .value { font-size: 1.9rem; font-weight: 650; line-height: 1.3; color: var(--accent); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; width: 100%; }
th, td { text-align: left; padding: .42rem 1.2rem .42rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--faint); font-size: .84rem; vertical-align: bottom; }
thead tr:last-child > * { border-bottom: 1px solid var(--rule); }
td { overflow-wrap: anywhere; }
.numbers td, .numbers th:not(:first-child) {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
}
.numbers th[scope=row] { white-space: nowrap; }
.numbers tr > :last-child { padding-right: 0; }
code { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.4rem 1.8rem; }
figure { margin: 0; }
.curves figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .2rem; }
svg { display: block; height: auto; }
svg text { font-family: inherit !important; }
.picture { margin-bottom: .6rem; }
/* The pictures are drawn on white, and colours are judged on it. */
.picture img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: 8px; }
.picture figcaption { color: var(--faint); font-size: .84rem; margin-top: .4rem; }
details { margin-top: .6rem; }
summary { cursor: pointer; color: var(--accent); }
details[open] summary { margin-bottom: .6rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 3rem; }
  section { padding: 1rem; }
}
@media print {
  body { background: none; padding: 0; }
  section, .tile, figure { break-inside: avoid; }
}
</style>
</head>
<body>
{{body}}
<footer class="facts">Written by ssljax.</footer>
</body>
</html>
"""
