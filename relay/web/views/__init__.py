"""The views: what each route does with a request. Which route is whose stands in relay.web.extension and relay.app."""
