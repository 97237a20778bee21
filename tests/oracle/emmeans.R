# Reference contrasts of marginal means: emmeans on fits of lme4, one JSON file per data set.
#   Rscript tests/oracle/emmeans.R tests/oracle            # or with names of cases behind
# Optima of lme4 are polished by Newton steps. Limits of Tukey's intervals are given twice: as emmeans has them (qtukey,
# good to 1e-4) and by the root of ptukey. Probabilities of the multivariate t are mvtnorm's with tight tolerances, at
# whole degrees of freedom, which it needs.
suppressPackageStartupMessages({
  library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(multcomp); library(mvtnorm)
  library(jsonlite)
})
arguments <- commandArgs(TRUE)
emm_options(msg.nesting = FALSE)
options(contrasts = c("contr.treatment", "contr.poly"))

polished <- function(formula, data) {
  start <- lme4::lmer(formula, data, control = lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9)))
  parsed <- lFormula(formula, data)
  criterion <- do.call(mkLmerDevfun, parsed)
  theta <- getME(start, "theta")
  for (i in 1:4) {
    step <- solve(numDeriv::hessian(criterion, theta), numDeriv::grad(criterion, theta))
    theta <- theta - step
  }
  criterion(theta)
  found <- list(par = theta, fval = criterion(theta), conv = 0, message = "polished")
  call <- start@call
  call$formula <- formula
  model <- mkMerMod(environment(criterion), found, parsed$reTrms, parsed$fr, mc = call)
  list(model = model, step = max(abs(step)))
}

columns <- function(table) {
  table <- as.data.frame(table)
  names(table) <- sub("lower.CL|asymp.LCL", "lower", sub("upper.CL|asymp.UCL", "upper", names(table)))
  names(table) <- sub("SE", "std_error", sub("t.ratio|z.ratio", "statistic", sub("p.value", "p_value", names(table))))
  lapply(table, function(column) if (is.factor(column)) as.character(column) else column)
}

METHODS <- c("pairwise", "revpairwise", "trt.vs.ctrl", "trt.vs.ctrlk", "consec", "mean_chg", "poly", "eff", "del.eff")
ADJUSTED <- c("pairwise", "trt.vs.ctrl", "consec", "eff")
ADJUSTS <- c("sidak", "scheffe", "holm", "bonferroni", "fdr")

tables_of <- function(model, specs, ddf) {
  emm_options(lmer.df = ddf)
  found <- list()
  add <- function(...) found[[length(found) + 1]] <<- list(...)
  for (spec in specs) {
    means <- emmeans(model, as.formula(paste("~", spec)))
    add(kind = "means", spec = spec, table = columns(means))
    for (method in METHODS) {
      plain <- contrast(means, method)
      table <- summary(plain, infer = TRUE, adjust = "none")
      default <- plain@misc$adjust
      add(kind = "contrasts", spec = spec, method = method, default = if (is.null(default)) "none" else default,
          table = columns(table))
      # Degrees of freedom and standard errors are those of the table: only the adjusted columns follow.
      if (method %in% ADJUSTED) for (adjust in c(ADJUSTS, if (method == "pairwise") "tukey")) {
        table <- columns(summary(plain, infer = TRUE, adjust = adjust))
        table <- table[c("df", "lower", "upper", "p_value")]
        if (adjust == "tukey") {
          k <- length(unique(plain@grid$contrast))
          k <- (1 + sqrt(1 + 8 * k)) / 2
          exact <- function(df) if (is.na(df)) NA else
            uniroot(function(q) ptukey(q, k, df) - 0.95, c(1, 60), tol = 1e-12)$root / sqrt(2)
          table$critical <- sapply(table$df, exact)
        }
        add(kind = "adjusted", spec = spec, method = method, adjust = adjust, table = table[names(table) != "df"])
      }
    }
    # eff_size fails where a mean cannot be estimated.
    sizes <- if (!anyNA(means@bhat)) eff_size(means, sigma = 3, edf = 17.5)
    if (!is.null(sizes)) add(kind = "eff_size", spec = spec, sigma = 3, edf = 17.5, table = columns(sizes))
    for (adjust in c("tukey", "none")) {
      letters <- suppressMessages(cld(means, adjust = adjust, alpha = 0.05))
      add(kind = "letters", spec = spec, adjust = adjust, table = columns(letters))
    }
  }
  found
}

products_of <- function(model, spec, ddf) {
  emm_options(lmer.df = ddf)
  means <- emmeans(model, as.formula(paste("~", spec)))
  lapply(list("pairwise", c("trt.vs.ctrl", "poly"), c("eff", "consec")), function(methods) list(
    kind = "interaction", spec = spec, methods = as.list(methods),
    table = columns(summary(contrast(means, interaction = methods), infer = TRUE))))
}

joint_of <- function(model, by, ddf) {
  emm_options(lmer.df = ddf)
  tables <- lapply(c(list(NULL), as.list(by)), function(b) {
    # joint_tests rounds F and df: the same by hand, from the contrasts.
    found <- joint_tests(model, by = b)
    exact <- lapply(seq_len(nrow(found)), function(i) {
      term <- strsplit(found[["model term"]][i], ":")[[1]]
      if (any(term == "(confounded)") || found$df1[i] == 0) return(NA)
      grid <- ref_grid(model, cov.reduce = meanint)
      means <- emmeans(grid, term, by = b)
      rows <- contrast(means, interaction = "consec")
      own <- if (is.null(b)) TRUE else rows@grid[[b]] == found[[b]][i]
      L <- rows@linfct[own, , drop = FALSE]
      if (!is.na(rows@nbasis[1])) L <- estimability::estble.subspace(zapsmall(L), rows@nbasis)
      use <- !is.na(rows@bhat)
      L <- L[, use, drop = FALSE]
      rank <- qr(t(L))$rank
      basis <- t(qr.Q(qr(t(L))))[seq_len(rank), , drop = FALSE]
      estimate <- basis %*% rows@bhat[use]
      drop(t(estimate) %*% solve(basis %*% rows@V %*% t(basis), estimate)) / rank
    })
    table <- columns(found)
    table$term <- table[["model term"]]
    table$exact <- unlist(exact)
    list(kind = "joint", by = b, table = table)
  })
  tables
}

# One factor: P(max |T| > t) by nested quadrature over the factor and the standard deviation.
by_quadrature <- function(t, loadings, df) {
  rest <- sqrt(1 - loadings^2)
  all_within <- function(x) integrate(function(u) sapply(u, function(v)
    dnorm(v) * prod(pnorm((x - loadings * v) / rest) - pnorm((-x - loadings * v) / rest))),
    -9, 9, rel.tol = 1e-11, subdivisions = 500)$value
  if (df == 0) return(1 - all_within(t))
  density <- function(s) 2 * df * s * dchisq(df * s^2, df)
  ends <- sqrt(qchisq(c(1e-15, 1 - 1e-15), df) / df)
  1 - integrate(function(s) sapply(s, function(v) density(v) * all_within(t * v)), ends[1], ends[2],
                rel.tol = 1e-10, subdivisions = 500)$value
}

multivariate <- function(model, specs, ddf) {
  emm_options(lmer.df = ddf)
  found <- list()
  for (spec in specs) for (method in c("trt.vs.ctrl", "consec", "pairwise", "eff")) {
    plain <- contrast(emmeans(model, as.formula(paste("~", spec))), method, by = NULL)
    table <- as.data.frame(summary(plain))
    use <- which(!is.na(table$SE))
    if (length(use) < 2 || length(use) > 12) next
    R <- cov2cor(vcov(plain))[use, use]
    df <- if (is.infinite(table$df[use[1]])) 0 else floor(min(table$df[use]) + 0.25)
    t <- round(c(1.1, 2.3, 3.1), 1)
    set.seed(1)
    p <- lapply(t, function(x) pmvt(-rep(x, length(use)), rep(x, length(use)), df = df, corr = R,
                                    algorithm = GenzBretz(maxpts = 2e5, abseps = 1e-8)))
    one <- list(spec = spec, method = method, df = df, correlation = R, t = t,
                p = sapply(p, function(x) 1 - x[1]), error = sapply(p, attr, "error"))
    off <- R[upper.tri(R)]
    if (method == "trt.vs.ctrl" && nrow(R) > 2 && diff(range(off)) < 1e-7)
      one$quadrature <- sapply(t, by_quadrature, loadings = rep(sqrt(mean(off)), nrow(R)), df = df)
    found[[length(found) + 1]] <- one
  }
  found
}

case <- function(name, formula, data, specs, product, by, means_of_data = TRUE) {
  if (length(arguments) > 1 && !(name %in% arguments[-1])) return(invisible())
  fit <- polished(formula, data)
  model <- fit$model
  result <- list(
    formula = deparse(formula, 500), step = fit$step, theta = getME(model, "theta"), sigma = sigma(model),
    levels = lapply(Filter(is.factor, data), levels), data = lapply(data, function(x) if (is.factor(x)) as.character(x) else x),
    versions = lapply(setNames(nm = c("emmeans", "lme4", "lmerTest", "pbkrtest", "multcomp", "multcompView", "mvtnorm")),
                      function(p) as.character(packageVersion(p))))
  result$versions$R <- paste(R.version$major, R.version$minor, sep = ".")
  if (!means_of_data) result$data <- NULL
  for (ddf in c("satterthwaite", "kenward-roger")) {
    result[[ddf]] <- c(tables_of(model, specs, ddf), products_of(model, product, ddf), joint_of(model, by, ddf))
  }
  result$mvt <- c(multivariate(model, specs[1:2], "kenward-roger"), multivariate(model, specs[1:2], "asymptotic"))
  write(toJSON(result, digits = I(13), auto_unbox = TRUE, null = "null", na = "null"),
        file.path(arguments[1], paste0("emmeans_", name, ".json")))
}

# The cakes: balanced, recipes between replicates and temperatures within them.
cake <- lme4::cake
cake$temperature <- factor(cake$temperature, ordered = FALSE)
cake$recipe <- factor(cake$recipe)
case("cake", angle ~ recipe * temperature + (1 | recipe:replicate), cake[c("replicate", "recipe", "temperature", "angle")],
     c("recipe", "temperature", "recipe | temperature"), "recipe * temperature", "recipe", means_of_data = FALSE)

# A split plot: varieties on whole plots of six blocks, doses on their parts.
set.seed(25)
split <- expand.grid(dose = factor(c("none", "low", "mid", "high"), c("none", "low", "mid", "high")),
                     variety = factor(c("red", "green", "blue")), block = factor(paste0("b", 1:6)))
plots <- interaction(split$block, split$variety)
split$yield <- round(80 + c(0, 18, 30, 34)[split$dose] + c(4, 0, -6)[split$variety] + rnorm(6, 0, 12)[split$block] +
  rnorm(nlevels(plots), 0, 8)[plots] + rnorm(nrow(split), 0, 11), 1)
case("split_plot", yield ~ variety * dose + (1 | block / variety), split,
     c("dose", "variety", "variety | dose"), "variety * dose", "dose")

# A trial with visits, its baseline as a covariate and rows missing: more in one arm.
set.seed(21)
trial <- expand.grid(visit = factor(paste0("v", 1:4)), id = factor(sprintf("p%02d", 1:36)))
trial$arm <- factor(rep(c("placebo", "low", "high"), 12)[trial$id], c("placebo", "low", "high"))
trial$base <- round(rnorm(36, 50, 8), 1)[trial$id]
trial$time <- as.integer(trial$visit) - 1
trial$y <- round(10 + 0.4 * trial$base + c(0, 1.5, 2.2)[trial$arm] * trial$time + rnorm(36, 0, 4)[trial$id] +
  rnorm(36, 0, 1.2)[trial$id] * trial$time + rnorm(nrow(trial), 0, 3), 1)
trial <- trial[runif(nrow(trial)) > ifelse(trial$arm == "high", 0.25, 0.08) * trial$time, ]
case("trial", y ~ arm * visit + base + (1 + time | id), trial,
     c("arm", "visit", "arm | visit", "visit | arm"), "arm * visit", c("visit", "arm"))

# The same without a cell: what of its margins can be estimated?
holed <- trial[!(trial$arm == "high" & trial$visit == "v4"), ]
case("holed", y ~ arm * visit + base + (1 | id), holed,
     c("arm", "visit", "arm | visit", "visit | arm"), "arm * visit", c("visit", "arm"))
