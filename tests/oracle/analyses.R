# Reference numbers of docs/analyses.md: lme4, lmerTest, pbkrtest, emmeans and multcomp on the page's own tables.
#   Rscript tests/oracle/analyses.R tests/data tests/oracle/analyses.json
# The tables tests/data/analyses_*.csv are those that the page makes (`trial`, `split`, `responses`, `pilot`).
suppressPackageStartupMessages({
  library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(multcomp); library(jsonlite)
})
arguments <- commandArgs(TRUE)
read <- function(name) read.csv(file.path(arguments[1], paste0("analyses_", name, ".csv")))
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e5, rhoend = 1e-10), calc.derivs = FALSE,
                       check.conv.singular = "ignore")

# The optimum by Newton steps from where bobyqa stopped; only of regular fits.
polished <- function(formula, data) {
  model <- lmer(formula, data, control = control)
  criterion <- update(model, devFunOnly = TRUE)
  theta <- getME(model, "theta")
  for (i in 1:4) theta <- theta - solve(numDeriv::hessian(criterion, theta), numDeriv::grad(criterion, theta))
  lmer(formula, data, start = theta, control = lmerControl(optimizer = NULL, calc.derivs = FALSE,
                                                           check.conv.singular = "ignore"))
}
f_row <- function(model, term) {
  row <- anova(model, ddf = "Kenward-Roger")[term, ]
  list(statistic = row[["F value"]], num_df = row[["NumDF"]], den_df = row[["DenDF"]], p_value = row[["Pr(>F)"]])
}
table_of <- function(object, ...) {
  table <- as.data.frame(summary(object, infer = TRUE, ...))
  names(table) <- sub("SE", "std_error", sub("lower.CL", "lower", sub("upper.CL", "upper", names(table))))
  names(table) <- sub("t.ratio", "statistic", sub("p.value", "p_value", names(table)))
  lapply(table, function(column) if (is.factor(column)) as.character(column) else column)
}
sds <- function(model) { v <- as.data.frame(VarCorr(model)); list(sdcor = v$sdcor) }
found <- list()

trial <- read("trial")
trial$arm <- factor(trial$arm, c("placebo", "low", "high"))
model <- polished(score ~ baseline + arm * visit + (week | patient), trial)
means <- emmeans(model, ~ arm | visit)
contrasts <- contrast(means, "trt.vs.ctrl")
set.seed(1)
found$trial <- list(
  criterion = REMLcrit(model), sds = sds(model), interaction = f_row(model, "arm:visit"),
  within = table_of(contrasts), within_mvt = table_of(contrasts, adjust = "mvt"),
  all = table_of(contrasts, by = NULL, adjust = "mvt"),
  joint = as.list(as.data.frame(joint_tests(model, by = "visit")))
)

split <- read("split")
split$irrigation <- factor(split$irrigation, c("none", "low", "high"))
model <- polished(yield ~ irrigation * variety + (1 | block / irrigation), split)
means <- emmeans(model, ~ variety | irrigation)
letters_of <- as.data.frame(cld(means, Letters = letters))
edf <- 43.108243312  # of mixjax, so that the standard errors can be compared
found$split <- list(
  criterion = REMLcrit(model), sds = sds(model), interaction = f_row(model, "irrigation:variety"),
  within = table_of(pairs(means)),
  letters = list(irrigation = as.character(letters_of$irrigation), variety = as.character(letters_of$variety),
                 group = trimws(letters_of$.group)),
  products = table_of(contrast(emmeans(model, ~ irrigation * variety), interaction = "pairwise")),
  sigma = sigma(model), edf = edf, sizes = table_of(eff_size(means, sigma = sigma(model), edf = edf))
)

responses <- read("responses")
maximal <- lmer(rt ~ A * B + (1 + A * B | subject) + (1 + A * B | item), responses, control = control)
uncorrelated <- lmer(rt ~ A * B + (1 + A * B || subject) + (1 + A * B || item), responses, control = control)
supported <- polished(rt ~ A * B + (1 + A || subject) + (1 | item), responses)
coefficients_of <- function(model) {
  table <- coef(summary(model, ddf = "Kenward-Roger"))
  list(term = rownames(table), estimate = table[, "Estimate"], std_error = table[, "Std. Error"], df = table[, "df"],
       p_value = table[, "Pr(>|t|)"])
}
one <- as.data.frame(ranova(lmer(rt ~ A * B + (1 + A || subject) + (1 | item), responses, control = control)))
found$crossed <- list(
  maximal = REMLcrit(maximal), uncorrelated = REMLcrit(uncorrelated), supported = REMLcrit(supported),
  singular = isSingular(maximal), sds = sds(supported), fixed_maximal = coefficients_of(maximal),
  fixed_supported = coefficients_of(supported), ranova = list(lrt = one$LRT[-1], term = rownames(one)[-1])
)

pilot <- read("pilot")
pilot$arm <- factor(pilot$arm, c("control", "active"))
model <- polished(score ~ arm * week + (week | patient), pilot)
v <- as.data.frame(VarCorr(model))
slope <- v$sdcor[v$var1 %in% "week" & is.na(v$var2)]
Sxx <- sum((c(0, 2, 4, 8) - 3.5)^2)
# Slopes patient by patient are a two-sample problem: the power of its t test, with the estimates as the truth.
power_of <- function(patients, spread) power.t.test(n = patients / 2, delta = 0.6,
  sd = sqrt((spread * slope)^2 + sigma(model)^2 / Sxx), strict = TRUE)$power
cells <- expand.grid(spread = c(0.75, 1, 1.5), patients = c(20, 40, 60, 100))
found$pilot <- list(
  criterion = REMLcrit(model), sds = sds(model), fixed = coefficients_of(model),
  power = list(patients = cells$patients, spread = cells$spread, power = mapply(power_of, cells$patients, cells$spread))
)
packages <- c("lme4", "lmerTest", "pbkrtest", "emmeans", "multcomp")
found$versions <- c(R = R.version.string, sapply(packages, function(p) as.character(packageVersion(p))))
write(toJSON(lapply(found, function(x) if (is.character(x)) as.list(x) else x), digits = 12, auto_unbox = TRUE,
             na = "null", pretty = TRUE), arguments[2])
