// React in one ES module, for pages without a build step: React itself ships CommonJS only. Built by tests/harness/js.py.
import React from "react";
import { createRoot } from "react-dom/client";

export const { Fragment, StrictMode, createElement, useEffect, useState, useSyncExternalStore } = React;
export { createRoot };
export default React;
